"""An expert on disk: its weights (safetensors), and everything needed to rebuild it around them (code.json).

A stock loader cannot know the expert's inner widths. So that it says so instead of filling the gaps with noise, the
folder also holds a config.json that every stock `from_pretrained` refuses, with the advice to use `load_expert`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aptp.backbones import BACKBONES
from aptp.codes import ArchitectureCode, PruningSpace
from aptp.cost import Convention, CostTable
from aptp.slicing import slice_unet

FORMAT = 1
_WEIGHTS, _CODE, _STOCK_CONFIG = "expert.safetensors", "code.json", "config.json"


@dataclass(frozen=True)
class BaseModel:
    """The model an expert was cut from: a name for people, and the SHA-256 of its weights."""

    name: str
    sha256: str

    @classmethod
    def of(cls, unet: nn.Module, name: str) -> "BaseModel":
        """Name a model and hash its weights (names, types, shapes and bytes; independent of the device)."""
        digest = hashlib.sha256()
        for key, tensor in sorted(unet.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return cls(name, digest.hexdigest())


@dataclass(frozen=True)
class ExpertCost:
    """MACs of one forward pass of one sample, their ratio to the base's, what they were counted for, and parameters."""

    macs: float
    ratio: float
    params: int
    latent_size: tuple[int, int]
    num_text_tokens: int
    convention: Convention


@dataclass(frozen=True)
class ExpertInfo:
    """What code.json says: the base, the code, its cost, and how to rebuild the model."""

    base: BaseModel
    code: ArchitectureCode
    cost: ExpertCost
    backbone: str
    config: dict[str, Any]


def save_expert(
    path: Path | str, small: nn.Module, code: ArchitectureCode, *, base: BaseModel, cost: CostTable
) -> None:
    """Write an expert to the folder `path` (made if need be).

    Args:
        small: the slice of `code`, fine-tuned or not.
        base: the model it was cut from.
        cost: the base's cost table; the expert's cost is read from it.

    Raises:
        ValueError: `small` is not the slice of `code`, or the table is of another space.
    """
    if cost.space.fingerprint != code.space.fingerprint:
        raise ValueError("the cost table is of another space than the code: count the space the code was made for")
    config = json.loads(small.to_json_string())  # type: ignore[operator]
    tensors = _tensors_of(small)
    _check_tensors(_skeleton(type(small).__name__, config, code), _shapes(tensors), "the model to save")
    mask = code.mask[None]
    params = sum(parameter.numel() for parameter in small.parameters())
    macs, ratio = float(cost.macs(mask)), float(cost.ratio(mask))
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS)
    _write_json(
        folder / _CODE,
        {
            "format": FORMAT,
            "base": asdict(base),
            "space": code.space.to_json(),
            "code": code.to_json(),
            "cost": asdict(ExpertCost(macs, ratio, params, cost.latent_size, cost.num_text_tokens, cost.convention)),
            "backbone": type(small).__name__,
            "config": config,
        },
    )
    advice = f"none: this folder is an APTP expert cut from {base.name}; load it with aptp.load_expert(folder)"
    _write_json(
        folder / _STOCK_CONFIG,
        {"_class_name": type(small).__name__, "quantization_config": {"quant_method": advice}},
    )


def read_expert_info(path: Path | str) -> ExpertInfo:
    """Read code.json without the weights; ValueError naming the file and field when it is not a whole expert."""
    file = Path(path) / _CODE
    if not file.is_file():
        raise ValueError(f"{Path(path)} is not an expert: it has no {_CODE}; write one with save_expert")
    value = json.loads(file.read_text())
    fields = {"format", "base", "space", "code", "cost", "backbone", "config"}
    if not isinstance(value, dict) or value.get("format") != FORMAT or set(value) != fields:
        raise ValueError(f"{file}: format {FORMAT} with the fields {', '.join(sorted(fields))} is expected")
    if value["backbone"] not in {cls.__name__ for cls in BACKBONES}:
        raise ValueError(f"{file}: backbone {value['backbone']!r} is not in aptp.backbones.BACKBONES")
    try:
        space = PruningSpace.from_json(value["space"])
        return ExpertInfo(
            base=BaseModel(**value["base"]),
            code=ArchitectureCode.from_json(space, value["code"]),
            cost=ExpertCost(**value["cost"] | {"latent_size": tuple(value["cost"]["latent_size"])}),
            backbone=value["backbone"],
            config=value["config"],
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def load_expert(path: Path | str, *, base: BaseModel | None = None) -> Any:
    """The expert in the folder `path`: a stock class, on the CPU, in the type it was saved in, in eval mode.

    Built without memory, then given the file's tensors; nothing is unpickled. Give `base` to insist on the model it
    must have been cut from. ValueError when that differs, or a tensor is missing, surplus or of another shape.
    """
    info = read_expert_info(path)
    if base is not None and base != info.base:
        raise ValueError(
            f"{Path(path)} was cut from {info.base.name!r} ({info.base.sha256[:12]}), "
            f"not from {base.name!r} ({base.sha256[:12]}): take an expert of that base, or cut one with slice_unet"
        )
    weights = Path(path) / _WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{Path(path)} is not a whole expert: it has no {_WEIGHTS}")
    small = _skeleton(info.backbone, info.config, info.code)
    with safe_open(weights, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    _check_tensors(small, shapes, str(weights))
    tensors = load_file(weights)
    buffers = {name for name, _ in small.named_buffers()}
    for name in buffers:
        parent, _, attribute = name.rpartition(".")
        setattr(small.get_submodule(parent), attribute, tensors[name])
    small.load_state_dict({name: tensors[name] for name in small.state_dict()}, assign=True)
    return small.eval()


def _skeleton(backbone: str, config: Mapping[str, Any], code: ArchitectureCode) -> nn.Module:
    """The expert without memory."""
    cls: Any = next(cls for cls in BACKBONES if cls.__name__ == backbone)
    with torch.device("meta"):
        whole = cls.from_config(dict(config))
    return slice_unet(whole, code)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All a model holds, also the buffers that its state dict leaves out."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_tensors(skeleton: nn.Module, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    expected = _shapes(_tensors_of(skeleton))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{where}: tensor {name!r} has shape {found.get(name, 'none')}, the code asks for "
                f"{expected.get(name, 'none')}: save the slice together with the code it was cut by"
            )


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")
