"""Reads what can be pruned from an unmodified diffusers model: nothing about a particular network is written down.

Two small tables say which module class offers what: `WIDTH_OFFERS` and `DEPTH_OFFERS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from operator import attrgetter
from typing import Any, Literal

from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from aptp.backbones import Layer, backbone_of
from aptp.codes import DepthKind, PruningSpace, Site, WidthKind

CUTTABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.GroupNorm)


@dataclass(frozen=True)
class WidthOffer:
    """The inner channels of one module class: who makes them, who consumes them, what counts them.

    `producers` are the children whose output rows are these channels (possibly several stacks of them, as in GEGLU);
    `outside` the children that never see them. The channels fall into atoms that can be removed alone: `atom_counts`
    are the attributes that hold the number of atoms (none: every channel is one), `channel_counts` those that hold the
    number of channels.
    """

    kind: WidthKind
    consumer: str
    producers: tuple[str, ...]
    outside: tuple[str, ...] = ()
    atom_counts: tuple[str, ...] = ()
    channel_counts: tuple[str, ...] = ()


WIDTH_OFFERS: Mapping[type[nn.Module], WidthOffer] = {
    ResnetBlock2D: WidthOffer(
        kind="groups",
        consumer="conv2",
        producers=("conv1", "time_emb_proj", "norm2"),
        outside=("norm1", "conv_shortcut", "upsample", "downsample"),
        atom_counts=("norm2.num_groups",),
    ),
    Attention: WidthOffer(
        kind="heads",
        consumer="to_out.0",
        producers=("to_q", "to_k", "to_v"),
        outside=("group_norm", "norm_cross"),
        atom_counts=("heads", "sliceable_head_dim"),
        channel_counts=("inner_dim", "inner_kv_dim"),
    ),
    FeedForward: WidthOffer(kind="hidden", consumer="net.2", producers=("net.0.proj",)),
}

DEPTH_OFFERS: Mapping[type[nn.Module], DepthKind] = {
    ResnetBlock2D: "resnet",
    Transformer2DModel: "transformer",
    BasicTransformerBlock: "block",
}


@dataclass(frozen=True)
class Granule:
    """What one unit is made of, for alignment: norm groups of a resnet, heads of an attention, channels of a
    feed-forward layer (None: a 32nd of the layer, as in the paper, or the next coarser part that divides it)."""

    groups: int = 1
    heads: int = 1
    hidden: int | None = None

    def __post_init__(self) -> None:
        for field in ("groups", "heads", "hidden"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"granule.{field} = {value}: a unit has at least one part")


DepthOrder = Callable[[Sequence[int], int], tuple[int, ...] | None]


def outermost_first(blocks: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Keep the layers nearest to the input and the output longest, the output's side before the input's.

    `blocks` holds the block of every depth site, in order. For SD 2.1 this is the order of the official code.
    """

    def rank(site: int) -> tuple[int, bool, int]:
        block = blocks[site]
        from_output = 2 * block > num_blocks - 1
        return min(block, num_blocks - 1 - block), not from_output, -site if from_output else site

    return tuple(sorted(range(len(blocks)), key=rank))


def any_order(blocks: Sequence[int], num_blocks: int) -> None:
    """Leave every depth entry to be learned by itself."""


def read_space(
    unet: nn.Module,
    *,
    granule: Granule = Granule(),
    depth: Literal["last", "every", "none"] = "last",
    depth_order: DepthOrder = outermost_first,
) -> PruningSpace:
    """The pruning space of a model.

    Args:
        granule: how many norm groups, heads and feed-forward channels make one unit.
        depth: "last" offers the last resnet and transformer of every outer block (the paper), "every" each layer whose
            in-width equals its out-width (of a transformer that stacks several blocks, as SDXL's, each block), "none"
            no depth site.
        depth_order: ranks the depth sites (`outermost_first`, `any_order` or your own).

    Raises:
        ValueError: the model's class, or a layer in it, is not in the tables; or a granule does not divide a layer.
    """
    if depth not in ("last", "every", "none"):
        raise ValueError(f"depth {depth!r} is not one of last, every, none")
    backbone = backbone_of(unet)
    layers = list(backbone.layers(unet))
    width = [site for layer in layers for site in _width_sites(unet, layer.path, granule)]
    if depth == "every":
        layers = [part for layer in layers for part in _finest(unet, layer)]
    chosen = [
        (layer, DEPTH_OFFERS[type(unet.get_submodule(layer.path))])
        for layer in layers
        if layer.identity_channels > 0
        and type(unet.get_submodule(layer.path)) in DEPTH_OFFERS
        and (depth == "every" or (depth == "last" and layer.last))
    ]
    return PruningSpace(
        width=tuple(width),
        depth=tuple(Site(layer.path, kind, 1, layer.identity_channels) for layer, kind in chosen),
        keep_order=depth_order([layer.block for layer, _ in chosen], len(backbone.blocks(unet))),
    )


def _finest(model: nn.Module, layer: Layer) -> list[Layer]:
    """The layers that a layer stacks, if they are several that can be dropped one by one; else itself."""
    inner = [
        path
        for path, module in model.get_submodule(layer.path).named_modules(prefix=layer.path)
        if path != layer.path and type(module) in DEPTH_OFFERS
    ]
    return [layer] if len(inner) < 2 else [layer._replace(path=path) for path in inner]


def _width_sites(model: nn.Module, path: str, granule: Granule) -> Iterator[Site]:
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        offer = WIDTH_OFFERS.get(type(module))
        if offer is None:
            continue
        channels = checked_channels(module, offer, name)
        atoms = attrgetter(offer.atom_counts[0])(module) if offer.atom_counts else channels
        atoms_per_unit = granule.groups if offer.kind == "groups" else granule.heads
        if offer.kind == "hidden":
            atoms_per_unit = granule.hidden or channels // gcd(channels, 32)
        if atoms % atoms_per_unit:
            raise ValueError(
                f"site '{name}.{offer.consumer}': granule.{offer.kind} = {atoms_per_unit} does not divide "
                f"its {atoms} {offer.kind}: choose a divisor"
            )
        units = atoms // atoms_per_unit
        if units > 1:  # one unit leaves no choice
            yield Site(f"{name}.{offer.consumer}", offer.kind, units, channels // units)


def checked_channels(module: nn.Module, offer: WidthOffer, name: str) -> int:
    """Inner channels of a module with an offer; ValueError when it holds layers the offer does not know."""
    known = {offer.consumer, *offer.producers}
    for child, layer in module.named_modules():
        outside = any(child == path or child.startswith(f"{path}.") for path in offer.outside)
        has_parameters = next(layer.parameters(recurse=False), None) is not None
        if has_parameters and not outside and (child not in known or type(layer) not in CUTTABLE):
            raise ValueError(
                f"layer '{name}.{child}' ({type(layer).__name__}) is not one that can be cut: "
                "unfuse projections, and merge or unload adapters, before pruning"
            )
    consumer: Any = module.get_submodule(offer.consumer)
    channels = int(consumer.weight.shape[1])
    for producer in producers_of(module, offer).values():
        if producer.weight.shape[0] % channels:
            raise ValueError(
                f"module {name!r} makes {producer.weight.shape[0]} channels and consumes {channels}: "
                "grouped keys and values are not supported"
            )
    return channels


def producers_of(module: nn.Module, offer: WidthOffer) -> dict[str, Any]:
    """The producers that this module really has, by name (a resnet without timestep has no projection of it)."""
    children = dict(module.named_modules())
    return {name: children[name] for name in offer.producers if name in children}


def offer_of(site: Site) -> WidthOffer:
    """The table entry a width site was read from."""
    return next(offer for offer in WIDTH_OFFERS.values() if offer.kind == site.kind)


def check_space(model: nn.Module, space: PruningSpace) -> None:
    """ValueError naming the first site of `space` that `model` does not have in this size."""
    backbone_of(model)
    modules: dict[str, Any] = dict(model.named_modules())
    for site in space.width:
        layer = modules.get(site.name)
        found = None if layer is None or type(layer) not in CUTTABLE else int(layer.weight.shape[1])
        if found != site.channels:
            raise ValueError(
                f"site {site.name!r} has {site.channels} channels in the space and {found or 'none'} in this model: "
                "the space was read from another model; read it from this one with read_space"
            )
    for site in space.depth:
        if site.name not in modules or DEPTH_OFFERS.get(type(modules[site.name])) != site.kind:
            raise ValueError(
                f"depth site {site.name!r} is no {site.kind} of this model: "
                "the space was read from another model; read it from this one with read_space"
            )


def identity(site: Site, hidden: Tensor) -> Tensor:
    """What passes when a depth site is dropped: all of the stream; of a resnet's input (which in an up block is
    cat(stream, skip)) the first channels."""
    return hidden[:, : site.channels_per_unit] if site.kind == "resnet" else hidden
