"""Cuts a smaller model out of a model, equal to it under the hard gates of the same code.

The small model is of the same stock class: its inner layers are narrower, and a dropped layer is a `Skipped`.
"""

import copy
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from aptp.codes import ArchitectureCode, Site
from aptp.sites import check_space, identity, offer_of, producers_of

Model = TypeVar("Model", bound=nn.Module)


class Skipped(nn.Module):
    """Stands where a layer was dropped, and answers its block's call by passing the stream on."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.out_channels = site.channels_per_unit

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        passed = identity(self.site, hidden)
        return (passed,) if self.site.kind == "transformer" else passed

    def extra_repr(self) -> str:
        return f"{self.site.kind}, channels={self.out_channels}"


def slice_unet(unet: Model, code: ArchitectureCode) -> Model:
    """A new model that holds only what `code` keeps; `unet` is untouched and shares no memory with it.

    Equals `gated(unet)` under the same bits (within 1e-5 in float32), with every kept weight a copy of the original's.
    Only what is kept is ever copied. Forward and backward hooks are not. ValueError when the code is of another model.
    """
    check_space(unet, code.space)
    replaced: dict[nn.Module | Tensor, Any] = {}
    for site in code.space.depth:
        if code.drops(site.name):
            replaced[unet.get_submodule(site.name)] = Skipped(site)
    kept_sites = [
        (site, keep)
        for site, owner in zip(code.space.width, code.space.owners, strict=True)
        if (owner < 0 or not code.drops(code.space.depth[owner].name))
        and len(keep := _kept_channels(code, site)) < site.channels
    ]
    for site, keep in kept_sites:
        for producer in producers_of(_module_around(unet, site), offer_of(site)).values():
            for parameter in producer.parameters(recurse=False):
                replaced[parameter] = _cut_rows(parameter, keep, site.channels)
        weight: Any = unet.get_submodule(site.name).weight
        replaced[weight] = nn.Parameter(
            weight.detach().index_select(1, keep.to(weight.device)), requires_grad=weight.requires_grad
        )
    small = copy_replacing(unet, replaced)
    for site, keep in kept_sites:
        _settle(_module_around(small, site), site, len(keep))
    return small


def copy_replacing(model: Model, replaced: Mapping[nn.Module | Tensor, Any]) -> Model:
    """A deep copy in which some modules and tensors are replaced (and never copied), without the original's hooks."""
    memo: dict[int, Any] = {id(original): replacement for original, replacement in replaced.items()}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith(("_forward", "_backward")) and isinstance(value, dict):
                memo[id(value)] = type(value)()
    return copy.deepcopy(model, memo)


def _kept_channels(code: ArchitectureCode, site: Site) -> Int[Tensor, " channel"]:
    within_unit = torch.arange(site.channels_per_unit, device=code.bits.device)
    return (code.kept_units(site.name)[:, None] * site.channels_per_unit + within_unit).flatten()


def _module_around(model: nn.Module, site: Site) -> nn.Module:
    """The module whose width the site is: the one whose child consumes its channels."""
    return model.get_submodule(site.name.removesuffix(f".{offer_of(site).consumer}"))


def _cut_rows(parameter: nn.Parameter, keep: Int[Tensor, " channel"], channels: int) -> nn.Parameter:
    """Keep the same channels in each of the stacks that the rows consist of (GEGLU makes two)."""
    stacks = parameter.detach().reshape(-1, channels, *parameter.shape[1:])
    rows = stacks.index_select(1, keep.to(parameter.device)).flatten(0, 1)
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


def _settle(module: nn.Module, site: Site, channels: int) -> None:
    """Let the attributes of the cut layers and of the module around them tell their new sizes."""
    offer = offer_of(site)
    layers: list[Any] = [*producers_of(module, offer).values(), module.get_submodule(offer.consumer)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
        elif isinstance(layer, nn.GroupNorm):
            layer.num_channels = len(layer.weight)
    for path in offer.atom_counts:
        _assign(module, path, attrgetter(path)(module) * channels // site.channels)
    for path in offer.channel_counts:
        _assign(module, path, channels)


def _assign(module: nn.Module, path: str, value: int) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
