"""What a diffusers pipeline folder must hold, and what no stage can use: told in one line before a weight is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import diffusers
from safetensors import SafetensorError, safe_open

from aptp.losses import check_scheduler
from aptp_platform.storage.errors import DamagedError

_WEIGHTS: Final = re.compile(r"(?:model|diffusion_pytorch_model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
_VARIANTS: Final = ("fp32", "fp16", "bf16")  # the one with more digits first
_PICKLED: Final = (".bin", ".ckpt", ".pt", ".pth")
_ADAPTER: Final = re.compile(r"(^|[._])(lora|hada|lokr)_?(A|B|up|down|w1|w2|embedding)?[._]")
_CONDITIONS: Final = (  # of a UNet, that the stages do not give it
    "addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type",
    "time_cond_proj_dim",
)  # fmt: skip


def check_folder(folder: Path, parts: Sequence[str], spec: str) -> None:
    """That the folder holds these parts whole, nothing that would be ignored, and a UNet that the stages can call.

    Args:
        parts: of `unet`, `vae`, `scheduler`, `text_encoder`, `tokenizer`.
        spec: what the config calls the folder.

    Raises:
        ValueError: it does not.
    """
    for part in parts:
        require_part(folder, part, spec)
        if part not in ("scheduler", "tokenizer"):
            weights_variant(folder / part)
    _refuse_adapters(folder, spec)
    if "unet" in parts and "vae" in parts:
        _check_unet(folder, spec)
    if "scheduler" in parts:
        load_scheduler(folder)


def require_part(folder: Path, part: str, spec: str) -> None:
    if (folder / part).is_dir():
        return
    there = sorted(path.name for path in folder.iterdir())
    single = [name for name in there if name.endswith((".safetensors", ".ckpt"))]
    fix = "name a diffusers pipeline folder, as save_pretrained writes it"
    if single:
        fix = (
            f"convert the file {single[0]}: diffusers.StableDiffusionPipeline.from_single_file(FILE)"
            ".save_pretrained(FOLDER)"
        )
    raise ValueError(
        f"model.pipeline: {spec}: holds no folder {part}/ (it holds {', '.join(there[:8]) or 'nothing'}); {fix}"
    )


def weights_variant(part: Path) -> str | None:
    """The variant of the safetensors in a model's folder: None for plain names, else `fp16` for `*.fp16.safetensors`.

    Raises:
        DamagedError: one is not whole.
        ValueError: there are none, or of other variants only.
    """
    there = sorted(path.name for path in part.iterdir())
    found = {name: match[1] for name in there if (match := _WEIGHTS.fullmatch(name))}
    variant = None
    if None not in found.values():
        variant = next((each for each in _VARIANTS if each in found.values()), None)
        if variant is None:
            raise ValueError(_no_weights(part, there, found))
    for name in (name for name, of in found.items() if of == variant):
        try:
            keys = tensor_names(part / name)
        except SafetensorError as error:
            raise DamagedError(f"{part / name}: is no whole safetensors file ({error}); download it again") from None
        if any(map(_ADAPTER.search, keys)):
            raise ValueError(f"{part / name}: holds LoRA weights; {_FUSE}")
    return variant


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file, of which only the beginning is read.

    Raises:
        SafetensorError: it is none, or is cut off.
    """
    with safe_open(path, "pt") as stream:
        return list(stream.keys())


def load_scheduler(folder: Path) -> Any:
    """The pipeline's scheduler.

    Raises:
        ValueError: it is none, or none that stages can train and sample with.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    name = read_json(path).get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not is_scheduler or "Inverse" in kind.__name__:
        raise ValueError(
            f"{path}: _class_name is {name!r}; it must name a scheduler of diffusers, such as DDIMScheduler"
        )
    try:
        scheduler = kind.from_pretrained(folder / "scheduler")
    except Exception as error:  # their constructors raise what they like
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: makes no {name}: {type(error).__name__}: {reason}; save the pipeline again"
        ) from None
    try:
        check_scheduler(scheduler)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return scheduler


def read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({type(error).__name__}); save the pipeline again") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: holds a {type(read).__name__}, no object; save the pipeline again")
    return read


_FUSE: Final = (
    "no stage applies them: fuse them with the scale that you want, pipe.load_lora_weights(FILE); "
    "pipe.fuse_lora(lora_scale=1.0); pipe.unload_lora_weights(); pipe.save_pretrained(FOLDER), or move the file away"
)


def _no_weights(part: Path, there: Sequence[str], found: dict[str, str | None]) -> str:
    fix = "save it again with save_pretrained(..., safe_serialization=True)"
    if found:
        known = ", ".join(_VARIANTS)
        return f"{part}: holds the weights {', '.join(found)}, of no known variant ({known}); {fix}"
    pickled = [name for name in there if name.endswith(_PICKLED)]
    if pickled:
        return f"{part}: holds {pickled[0]} and no safetensors, and pickled weights are not loaded; {fix}"
    return f"{part}: holds no weights (it holds {', '.join(there[:8]) or 'nothing'}); {fix}"


def _refuse_adapters(folder: Path, spec: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" and not _WEIGHTS.fullmatch(path.name):
            try:
                adapter = any(map(_ADAPTER.search, tensor_names(path)))
            except SafetensorError:
                adapter = "lora" in path.name.lower()
        else:
            adapter = path.suffix in _PICKLED and "lora" in path.name.lower()
        if adapter or path.name == "adapter_config.json":
            raise ValueError(f"model.pipeline: {spec}: {path.relative_to(folder)}: holds LoRA weights; {_FUSE}")


def _check_unet(folder: Path, spec: str) -> None:
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    for part, config, kind in (("unet", unet, "UNet2DConditionModel"), ("vae", vae, "AutoencoderKL")):
        if config.get("_class_name", kind) != kind:
            raise ValueError(f"model.pipeline: {spec}: {part}/ is a {config['_class_name']}; it must be a {kind}")
    wanted = [name for name in _CONDITIONS if unet.get(name) not in (None, False)]
    if wanted:
        raise ValueError(
            f"model.pipeline: {spec}: its UNet reads more than text ({', '.join(wanted)}), as those of SDXL, upscalers "
            "and LCMs do; name a model of the Stable Diffusion 1 or 2 kind"
        )
    channels = {unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)}
    if len(channels) > 1:
        raise ValueError(
            f"model.pipeline: {spec}: its UNet reads {unet.get('in_channels', 4)} channels and writes "
            f"{unet.get('out_channels', 4)}, its autoencoder has {vae.get('latent_channels', 4)}: models for "
            "inpainting, depth and editing cannot be pruned; name one that makes images of text alone"
        )
