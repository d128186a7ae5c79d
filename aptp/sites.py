"""Reads what can be pruned from an unmodified diffusers model: nothing about a particular network is written down.

Three small tables say which module class offers what (`WIDTH_OFFERS`, `DEPTH_OFFERS`) and how the layers of a backbone
follow each other (`BACKBONES`). Another backbone is one more entry.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

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


class Layer(NamedTuple):
    """A layer of a backbone: its path, the stage it lies in, the channels of the stream that enters it when that stream
    is as wide as the one that leaves it (else 0), and whether it is the last of its sort in an outer stage."""

    path: str
    stage: int
    identity_channels: int
    last: bool


@dataclass(frozen=True)
class Backbone:
    """How one model class is built: paths of its stages, its layers in the order of the architecture vector, and
    inputs (batch 1, on the model's device) for latents of (height, width) and a number of text tokens."""

    stages: Callable[[Any], list[str]]
    layers: Callable[[Any], Iterator[Layer]]
    example_inputs: Callable[[Any, tuple[int, int], int], dict[str, Any]]


def _unet_stages(unet: Any) -> list[str]:
    middle = [] if unet.mid_block is None else ["mid_block"]
    down = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    return down + middle + [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]


def _unet_layers(unet: Any) -> Iterator[Layer]:
    stream = unet.conv_in.out_channels
    for stage, path in enumerate(_unet_stages(unet)):
        block = unet.get_submodule(path)
        for i, resnet in enumerate(block.resnets):
            # An up block's resnet sees cat(stream, skip); only the stream could pass it by.
            resized = getattr(resnet, "up", False) or getattr(resnet, "down", False)
            identity = stream if resnet.out_channels == stream and not resized else 0
            yield Layer(f"{path}.resnets.{i}", stage, identity, path != "mid_block" and i == len(block.resnets) - 1)
            stream = resnet.out_channels
        attentions = getattr(block, "attentions", ())
        for i, attention in enumerate(attentions):
            if attention is not None:
                last = path != "mid_block" and i == len(attentions) - 1
                yield Layer(f"{path}.attentions.{i}", stage, stream, last)


def _unet_inputs(unet: Any, latent_size: tuple[int, int], num_text_tokens: int) -> dict[str, Any]:
    config, like = unet.config, unet.conv_in.weight
    inputs: dict[str, Any] = {
        "sample": like.new_zeros(1, config.in_channels, *latent_size),
        "timestep": torch.zeros(1, dtype=torch.long, device=like.device),
        "encoder_hidden_states": like.new_zeros(1, num_text_tokens, _text_width(config)),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": like.new_zeros(1, pooled), "time_ids": like.new_zeros(1, 6)}
    elif config.addition_embed_type is not None:
        raise ValueError(
            f"addition_embed_type {config.addition_embed_type!r} is not supported: only None and 'text_time' (SDXL) are"
        )
    return inputs


def _text_width(config: Any) -> int:
    width = config.encoder_hid_dim or config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def _pixart_stages(model: Any) -> list[str]:
    return [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]


def _pixart_layers(model: Any) -> Iterator[Layer]:
    for stage, path in enumerate(_pixart_stages(model)):
        yield Layer(path, stage, model.inner_dim, last=True)


def _pixart_inputs(model: Any, latent_size: tuple[int, int], num_text_tokens: int) -> dict[str, Any]:
    config, like = model.config, model.proj_out.weight
    text_width = config.caption_channels or config.cross_attention_dim
    inputs: dict[str, Any] = {
        "hidden_states": like.new_zeros(1, config.in_channels, *latent_size),
        "timestep": torch.zeros(1, dtype=torch.long, device=like.device),
        "encoder_hidden_states": like.new_zeros(1, num_text_tokens, text_width),
    }
    if model.use_additional_conditions:
        inputs["added_cond_kwargs"] = {"resolution": like.new_ones(1, 2), "aspect_ratio": like.new_ones(1, 1)}
    return inputs


BACKBONES: Mapping[type[nn.Module], Backbone] = {
    UNet2DConditionModel: Backbone(_unet_stages, _unet_layers, _unet_inputs),
    PixArtTransformer2DModel: Backbone(_pixart_stages, _pixart_layers, _pixart_inputs),
}


def backbone_of(model: nn.Module) -> Backbone:
    """The table entry of a model, or ValueError with the classes that have one."""
    if type(model) not in BACKBONES:
        known = ", ".join(cls.__name__ for cls in BACKBONES)
        raise ValueError(
            f"{type(model).__name__} is not a supported backbone ({known}): pass the bare model "
            "(not a compiled or distributed wrapper), or add an entry to aptp.sites.BACKBONES"
        )
    return BACKBONES[type(model)]


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


def outermost_first(stages: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Keep the layers nearest to the input and the output longest, the output's side before the input's.

    `stages` holds the stage of every depth site, in order. For SD 2.1 this is the order of the official code.
    """

    def rank(site: int) -> tuple[int, bool, int]:
        stage = stages[site]
        from_output = 2 * stage > num_stages - 1
        return min(stage, num_stages - 1 - stage), not from_output, -site if from_output else site

    return tuple(sorted(range(len(stages)), key=rank))


def any_order(stages: Sequence[int], num_stages: int) -> None:
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
            in-width equals its out-width, "none" no depth site.
        depth_order: ranks the depth sites (`outermost_first`, `any_order` or your own).

    Raises:
        ValueError: the model's class, or a layer in it, is not in the tables; or a granule does not divide a layer.
    """
    backbone = backbone_of(unet)
    layers = list(backbone.layers(unet))
    width = [site for layer in layers for site in _width_sites(unet, layer.path, granule)]
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
        keep_order=depth_order([layer.stage for layer, _ in chosen], len(backbone.stages(unet))),
    )


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
        if DEPTH_OFFERS.get(type(modules.get(site.name))) != site.kind:
            raise ValueError(
                f"depth site {site.name!r} is no {site.kind} of this model: "
                "the space was read from another model; read it from this one with read_space"
            )


def identity(site: Site, hidden: Tensor) -> Tensor:
    """What passes when a depth site is dropped: all of the stream; of a resnet's input (which in an up block is
    cat(stream, skip)) the first channels."""
    return hidden[:, : site.channels_per_unit] if site.kind == "resnet" else hidden
