"""Multiply-adds (MACs) of every architecture of a space, differentiable in its mask and exact for its bits.

Nothing is assumed about layers: the model is counted on the meta device twice, whole and with every width site cut to
one unit. MACs are affine in the units of a site, so the difference is what one unit costs.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from aptp.backbones import backbone_of
from aptp.codes import ArchitectureCode, PruningSpace
from aptp.sites import check_space, offer_of
from aptp.slicing import copy_replacing, slice_unet

Convention = Literal["true", "no_attention", "official"]
"""What is counted.

true: all multiply-adds of convolutions, linear layers and attention.
no_attention: the same without the two products inside attention; what thop, fvcore, calflops and ptflops report.
official: as the authors' counter does, for comparison with the paper: with norms, SiLU, softmax and biases, and with
cross-attention charged as if there were as many text tokens as pixels.
"""


@dataclass(frozen=True)
class CostTable:
    """MACs of one sample: `fixed` outside all sites, `width` for one unit of each width site, `depth` for what a depth
    site holds beside the units inside it."""

    space: PruningSpace
    latent_size: tuple[int, int]
    num_text_tokens: int
    convention: Convention
    fixed: int
    width: tuple[int, ...]
    depth: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        """MACs of the whole model."""
        return int(self.macs(torch.ones(1, len(self.space)))[0])

    @cached_property
    def minimum(self) -> float:
        """The MACs ratio of `ArchitectureCode.smallest`: below it there is no budget to aim at."""
        return float(self.ratio(ArchitectureCode.smallest(self.space).mask[None])[0])

    def macs(self, mask: Float[Tensor, "batch gate"]) -> Float64[Tensor, " batch"]:
        """MACs under each mask, entries in [0, 1]; for bits exactly those of the sliced model."""
        if mask.ndim != 2 or mask.shape[1] != len(self.space):
            raise ValueError(f"mask of shape {tuple(mask.shape)}: this space takes (batch, {len(self.space)})")
        entry_macs, owner_of_entry, depth_macs = _tensors(self, mask.device)
        width, depth = mask[:, : self.space.width_entries].double(), mask[:, self.space.width_entries :].double()
        always = depth.new_ones(len(mask), 1)
        owner_gate = torch.cat([depth, always], dim=1).index_select(1, owner_of_entry)
        return (width * owner_gate) @ entry_macs + depth @ depth_macs + self.fixed

    def ratio(self, mask: Float[Tensor, "batch gate"]) -> Float[Tensor, " batch"]:
        """MACs under each mask over those of the whole model: exactly 1 for open gates."""
        return (self.macs(mask) / self.total).to(torch.promote_types(mask.dtype, torch.float32))

    def to_json(self) -> dict[str, Any]:
        """The table as a JSON value."""
        return {
            "space": self.space.fingerprint,
            "latent_size": list(self.latent_size),
            "num_text_tokens": self.num_text_tokens,
            "convention": self.convention,
            "fixed": self.fixed,
            "width": list(self.width),
            "depth": list(self.depth),
        }

    @classmethod
    def from_json(cls, space: PruningSpace, value: Mapping[str, Any]) -> "CostTable":
        """The inverse of `to_json`; ValueError when the table is of another space."""
        if value["space"] != space.fingerprint:
            raise ValueError("this cost table belongs to another space: count it again with cost_table")
        height, width = value["latent_size"]
        return cls(
            space=space,
            latent_size=(height, width),
            num_text_tokens=value["num_text_tokens"],
            convention=value["convention"],
            fixed=value["fixed"],
            width=tuple(value["width"]),
            depth=tuple(value["depth"]),
        )


@lru_cache(maxsize=16)
def _tensors(table: CostTable, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """MACs of every width entry, the depth gate it hangs on (past the last: none), MACs of every depth entry. They are
    kept: a training step that copied them again would wait for its device."""
    space = table.space
    with torch.inference_mode(False):  # the next caller may want gradients
        units = torch.tensor([site.units for site in space.width], dtype=torch.long)
        owners = [owner if owner >= 0 else len(space.depth) for owner in space.owners]
        return (
            torch.tensor(table.width, dtype=torch.float64).repeat_interleave(units).to(device),
            torch.tensor(owners, dtype=torch.long).repeat_interleave(units).to(device),
            torch.tensor(table.depth, dtype=torch.float64).to(device),
        )


def cost_table(
    unet: nn.Module,
    space: PruningSpace,
    latent_size: tuple[int, int],
    num_text_tokens: int = 77,
    convention: Convention = "true",
) -> CostTable:
    """Count a model for latents of (height, width) and a text of so many tokens.

    ValueError when the space was read from another model or the convention is unknown.
    """
    check_space(unet, space)
    if convention not in get_args(Convention):
        raise ValueError(f"convention {convention!r} is not one of {', '.join(get_args(Convention))}")
    whole = on_meta(unet)
    bits = ArchitectureCode.smallest(space).bits
    bits[space.width_entries :] = True
    narrow = slice_unet(whole, ArchitectureCode(space, bits))
    before, after = (_macs_by_module(m, latent_size, num_text_tokens, convention) for m in (whole, narrow))

    width = []
    for site in space.width:
        module = site.name.removesuffix(f".{offer_of(site).consumer}")
        per_unit, rest = divmod(before[module] - after[module], site.units - 1)
        assert rest == 0, f"{site.name}: MACs are not affine in its units"
        width.append(per_unit)
    depth = [before[site.name] for site in space.depth]
    fixed = before[""] - sum(depth)
    for site, owner, per_unit in zip(space.width, space.owners, width, strict=True):
        if owner < 0:
            fixed -= per_unit * site.units
        else:
            depth[owner] -= per_unit * site.units
    return CostTable(space, latent_size, num_text_tokens, convention, fixed, tuple(width), tuple(depth))


def count_macs(
    unet: nn.Module, latent_size: tuple[int, int], num_text_tokens: int = 77, convention: Convention = "true"
) -> int:
    """MACs of one sample of a model as it stands, sliced or not."""
    return _macs_by_module(on_meta(unet), latent_size, num_text_tokens, convention)[""]


def on_meta(unet: nn.Module) -> nn.Module:
    """A copy without memory: shapes only."""
    replaced: dict[Any, Any] = {buffer: torch.empty_like(buffer, device="meta") for buffer in unet.buffers()}
    for parameter in unet.parameters():
        replaced[parameter] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return copy_replacing(unet, replaced).eval()


@torch.no_grad()
def _macs_by_module(
    model: nn.Module, latent_size: tuple[int, int], num_text_tokens: int, convention: Convention
) -> dict[str, int]:
    """MACs of every module of a model on meta, with all that it holds, by its path ("" is the whole)."""
    inputs = backbone_of(model).example_inputs(model, latent_size, num_text_tokens)
    return _official(model, inputs) if convention == "official" else _measured(model, inputs, convention)


def _measured(model: nn.Module, inputs: Mapping[str, Any], convention: Convention) -> dict[str, int]:
    """By torch's counter. On meta attention runs as plain products, which it counts; the CPU's fused kernel it does
    not (torch 2.13)."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    layers = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}
    macs = dict.fromkeys(dict(model.named_modules()), 0)
    for name, operations in counter.get_flop_counts().items():
        path = "" if name == "Global" else name.partition(".")[2]
        macs[path] = sum(flops for op, flops in operations.items() if convention == "true" or op in layers) // 2
    return macs


def _official(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, int]:
    """By the rules of the authors' `op_counter.py`: per class of module, from the size of its output."""
    own: Counter[str] = Counter()

    def charge(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            own[path] += _official_rule(module, args, output)

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as handles:
        for path, module in modules.items():
            handles.enter_context(module.register_forward_hook(charge(path)))
        model(**inputs)
    return {path: sum(own[name] for name, _ in module.named_modules(prefix=path)) for path, module in modules.items()}


def _official_rule(module: nn.Module, args: Any, output: Any) -> int:
    if isinstance(module, nn.Conv2d):
        return module.weight.numel() * output[0, 0].numel() + output.numel()
    if isinstance(module, nn.Linear):
        return args[0].numel() * module.out_features + (0 if module.bias is None else module.out_features)
    if isinstance(module, nn.GroupNorm | nn.SiLU):
        return 2 * output.numel()
    if isinstance(module, nn.LayerNorm):
        return output.numel()
    if isinstance(module, Attention):
        pixels = output.shape[1]
        return pixels * pixels * (2 * module.inner_dim + module.heads)
    return 0
