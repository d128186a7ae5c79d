"""How the layers of each supported model class follow each other. Another backbone is one more entry of `BACKBONES`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn


class Layer(NamedTuple):
    """A layer of a backbone.

    Its path; the index of its block; the channels of the stream that enters it if the stream that leaves it is as wide,
    else 0; and whether it is the last of its sort in an outer block.
    """

    path: str
    block: int
    identity_channels: int
    last: bool


@dataclass(frozen=True)
class Backbone:
    """One model class: the paths of its blocks, its layers in the order of the architecture vector, and keyword inputs
    (batch 1, on the model's device) for latents of (height, width) and a number of text tokens."""

    blocks: Callable[[Any], list[str]]
    layers: Callable[[Any], Iterator[Layer]]
    example_inputs: Callable[[Any, tuple[int, int], int], dict[str, Any]]


def _unet_blocks(unet: Any) -> list[str]:
    middle = [] if unet.mid_block is None else ["mid_block"]
    down = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    return down + middle + [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]


def _unet_layers(unet: Any) -> Iterator[Layer]:
    stream = unet.conv_in.out_channels
    for number, path in enumerate(_unet_blocks(unet)):
        block, outer = unet.get_submodule(path), path != "mid_block"
        for i, resnet in enumerate(block.resnets):
            # A resnet of an up block sees cat(stream, skip); only the stream could pass it by.
            resized = getattr(resnet, "up", False) or getattr(resnet, "down", False)
            identity = stream if resnet.out_channels == stream and not resized else 0
            yield Layer(f"{path}.resnets.{i}", number, identity, outer and i == len(block.resnets) - 1)
            stream = resnet.out_channels
        attentions = getattr(block, "attentions", ())
        for i, attention in enumerate(attentions):
            if attention is not None:
                yield Layer(f"{path}.attentions.{i}", number, stream, outer and i == len(attentions) - 1)


def _unet_inputs(unet: Any, latent_size: tuple[int, int], num_text_tokens: int) -> dict[str, Any]:
    config, like = unet.config, unet.conv_in.weight
    text_width = config.encoder_hid_dim or config.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": like.new_zeros(1, config.in_channels, *latent_size),
        "timestep": torch.zeros(1, dtype=torch.long, device=like.device),
        "encoder_hidden_states": like.new_zeros(
            1, num_text_tokens, text_width if isinstance(text_width, int) else text_width[0]
        ),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": like.new_zeros(1, pooled), "time_ids": like.new_zeros(1, 6)}
    elif config.addition_embed_type is not None or config.class_embed_type is not None:
        raise ValueError(
            f"addition_embed_type {config.addition_embed_type!r}, class_embed_type {config.class_embed_type!r}: "
            "only UNets without them, and 'text_time' (SDXL), can be counted; extend aptp.backbones"
        )
    return inputs


def _pixart_blocks(model: Any) -> list[str]:
    return [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]


def _pixart_layers(model: Any) -> Iterator[Layer]:
    for number, path in enumerate(_pixart_blocks(model)):
        yield Layer(path, number, model.inner_dim, last=True)


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
    UNet2DConditionModel: Backbone(_unet_blocks, _unet_layers, _unet_inputs),
    PixArtTransformer2DModel: Backbone(_pixart_blocks, _pixart_layers, _pixart_inputs),
}


def backbone_of(model: nn.Module) -> Backbone:
    """The table entry of a model, or ValueError with the classes that have one."""
    if type(model) not in BACKBONES:
        known = ", ".join(cls.__name__ for cls in BACKBONES)
        raise ValueError(
            f"{type(model).__name__} is not a supported backbone ({known}): pass the bare model "
            "(not a compiled or distributed wrapper), or add an entry to aptp.backbones.BACKBONES"
        )
    return BACKBONES[type(model)]
