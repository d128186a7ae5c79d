"""The terms of the two stages' objectives: functions of tensors, each a scalar.

pruning      L = denoising + l_out output + l_feat features + l_res resource + l_cont contrastive + l_pull pull
                 - l_std spread + l_max (1 - largest ratio)                                      (APTP, section 3)
fine-tuning  L = l_task denoising + l_out output + l_feat features
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

_NO_SIGNAL = 1e-7  # of alphas_cumprod: diffusers puts 0, or 2**-24 where it divides by it

Gather = Callable[[Tensor], Tensor]


def alone(rows: Tensor) -> Tensor:
    """The gather of a single worker; that of W workers joins their rows, (B, ...) of each to (W B, ...)."""
    return rows


@dataclass(frozen=True)
class LossTerms:
    """Named scalar terms and their weights (absent: 1); `total` is what is differentiated, `metrics` are detached."""

    terms: Mapping[str, Float[Tensor, ""]]
    weights: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Float[Tensor, ""]:
        return torch.stack([self.weights.get(name, 1.0) * term for name, term in self.terms.items()]).sum()

    def scalars(self) -> dict[str, float]:
        """Terms, total and scalar metrics as plain numbers, for a log."""
        values = {**self.terms, "total": self.total, **{k: v for k, v in self.metrics.items() if v.ndim == 0}}
        return {name: float(value.detach()) for name, value in values.items()}


def check_scheduler(scheduler: Any) -> None:
    """That a diffusers scheduler adds noise as diffusion models are trained with, and that its predictions can be used.

    Raises:
        ValueError: it is one of flow matching or EDM, its prediction type is unknown, or sampling divides by zero.
    """
    name, config = type(scheduler).__name__, scheduler.config
    kind, squared = getattr(config, "prediction_type", None), getattr(scheduler, "alphas_cumprod", None)
    if kind is None or squared is None or getattr(config, "use_flow_sigmas", False):
        raise ValueError(
            f"the scheduler {name} has no alphas_cumprod and prediction_type to train with (flow matching and EDM have "
            "another noise): use a model of the Stable Diffusion 1 or 2 kind, with DDIMScheduler say"
        )
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"the scheduler's prediction_type is {kind!r}; it must be 'epsilon', 'v_prediction' or 'sample'"
        )
    if not bool(((squared >= 0) & (squared <= 1)).all()):
        raise ValueError(f"the scheduler {name} has an alphas_cumprod that leaves 0..1: its betas must lie in 0..1")
    if kind == "epsilon" and float(squared.min()) < _NO_SIGNAL:
        raise ValueError(
            f"the scheduler {name} ends in noise without signal (rescale_betas_zero_snr), from which prediction_type "
            "'epsilon' makes no image: set rescale_betas_zero_snr to false, or train for 'v_prediction'"
        )


class NoiseSchedule(nn.Module):
    """The forward process of a diffusers scheduler and what its network predicts; a buffer, so it moves with a stage.

    x_t = a x + s e with a^2 = alphas_cumprod[t], s^2 = 1 - a^2, SNR = a^2 / s^2. The target is e ("epsilon"),
    a e - s x ("v_prediction") or x ("sample"), as `scheduler.config.prediction_type` says.
    """

    alphas_cumprod: Tensor

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        check_scheduler(scheduler)
        self.prediction_type: str = scheduler.config.prediction_type
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.detach().clone().float(), persistent=False)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def _factors(self, timesteps: Int[Tensor, " batch"], ndim: int) -> tuple[Tensor, Tensor]:
        squared = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (ndim - 1))
        return squared.sqrt(), (1 - squared).sqrt()

    def noisy(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """x_t."""
        a, s = self._factors(timesteps, latents.ndim)
        return a * latents + s * noise

    def target(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """What the network should answer at x_t."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        a, s = self._factors(timesteps, latents.ndim)
        return a * noise - s * latents

    def min_snr_weight(self, timesteps: Int[Tensor, " batch"], gamma: float) -> Float[Tensor, " batch"]:
        """Min-SNR weights (Hang et al. 2023, arXiv 2303.09556): min(snr, g)/snr for epsilon, min(snr, g) for x.

        For v the form is min(snr + 1, g)/(snr + 1), the one that diffusers' and the official trainer use: unlike
        min(snr, g)/(snr + 1) it does not silence the noisiest timesteps.
        """
        squared = self.alphas_cumprod[timesteps]
        snr = squared / (1 - squared)
        if self.prediction_type == "sample":
            return snr.clamp(max=gamma)
        scale = snr + 1 if self.prediction_type == "v_prediction" else snr.clamp_min(1e-8)
        return scale.clamp(max=gamma) / scale


def per_sample_error(
    prediction: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """The mean squared error of each row, in fp32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def denoising_loss(
    prediction: Float[Tensor, "batch channel height width"],
    target: Float[Tensor, "batch channel height width"],
    weight: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """mean_b w_b ||prediction_b - target_b||^2 / size."""
    return (weight * per_sample_error(prediction, target)).mean()


def output_loss(
    student: Float[Tensor, "batch channel height width"], teacher: Float[Tensor, "batch channel height width"]
) -> Float[Tensor, ""]:
    """Distillation of the output: the mean squared difference from the teacher's prediction."""
    return per_sample_error(student, teacher).mean()


def feature_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, normalise: bool = True, gather: Gather = alone
) -> Float[Tensor, ""]:
    """Distillation of the blocks' outputs: the mean over layers of each layer's squared difference.

    normalise: each layer's difference is divided by the teacher's power in that layer, over all workers' rows, so that
    a layer weighs the same whatever its scale (the sum in the paper is dominated by the layers with the largest
    activations).
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"student and teacher must give the same layers, they gave {len(student)} and {len(teacher)}")
    errors = torch.stack([(a.float() - b.float()).square().mean() for a, b in zip(student, teacher, strict=True)])
    if not normalise:
        return errors.mean()
    power = torch.stack([theirs.float().square().mean() for theirs in teacher])
    return (errors / gather(power[None]).mean(0).clamp_min(1e-8)).mean()


def resource_loss(ratio: Float[Tensor, ""], budget: float) -> Float[Tensor, ""]:
    """|ln(ratio / budget)|: zero at the budget and symmetric around it in the log (APTP, resource loss)."""
    return torch.log(ratio.float() / budget).abs()


def spread(ratios: Float[Tensor, " code"], usage: Float[Tensor, " code"]) -> Float[Tensor, ""]:
    """The standard deviation of the prompts' MACs ratios; its gradient is finite where all are equal."""
    share = usage / usage.sum()
    mean = (share * ratios).sum()
    return ((share * (ratios - mean).square()).sum() + 1e-8).sqrt()


def contrastive_loss(
    embeddings: Float[Tensor, "batch dim"],
    features: Float[Tensor, "batch gate"],
    *,
    temperature: float = 0.03,
    form: Literal["row", "bce"] = "row",
) -> Float[Tensor, ""]:
    """Similar prompts should get similar architectures: P = softmax(cos(z, z)/tau), S = softmax(cos(phi, phi)/tau).

    "row": the mean over prompts of KL(P_i || S_i), a prompt's own entry left out (it holds nearly all of P_ii's mass
    and says nothing about neighbours), in units of ln(N - 1), which is the most a uniform S can cost: the size of the
    term does not depend on the number of prompts N. "bce": the official mean over all N^2 entries of the binary
    cross-entropy of S against P, which falls as 1/N.
    """
    count = len(embeddings)
    if form == "row" and count < 3:
        return features.sum() * 0.0
    prompts = F.normalize(embeddings.float(), dim=1)
    architectures = F.normalize(features.float(), dim=1)
    logits_p, logits_s = prompts @ prompts.T / temperature, architectures @ architectures.T / temperature
    if form == "bce":
        log_s = logits_s.log_softmax(1)
        log_not_s = torch.log1p(-log_s.exp().clamp(max=1 - 1e-6))
        p = logits_p.softmax(1)
        return -(p * log_s.clamp_min(-100) + (1 - p) * log_not_s).mean()
    if form != "row":
        raise ValueError(f"form must be 'row' or 'bce', it is {form!r}")
    log_p, log_s = (_off_diagonal(logits).log_softmax(1) for logits in (logits_p, logits_s))
    return F.kl_div(log_s, log_p, log_target=True, reduction="batchmean") / math.log(count - 1)


def _off_diagonal(square: Float[Tensor, "row row"]) -> Float[Tensor, "row others"]:
    """Every row without its own entry. In a row-major square of n x n the diagonal is every (n + 1)th entry, so what
    follows the first is n - 1 lines of n + 1 entries that end in one (a boolean mask would wait for the device)."""
    n = len(square)
    return square.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def pull_loss(
    similarity: Float[Tensor, "batch code"], assigned: Int[Tensor, " batch"], *, temperature: float = 0.1
) -> Float[Tensor, ""]:
    """Pulls the predictor to the code that the transport gave its prompt: cross-entropy of softmax(C / tau), over ln K.

    Without it (the official code) training assigns by transport, inference by cosine, and nothing makes them agree.
    """
    codes = similarity.shape[1]
    if codes < 2:
        return similarity.sum() * 0.0
    return F.cross_entropy(similarity.float() / temperature, assigned) / math.log(codes)
