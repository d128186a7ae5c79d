"""Small real models for the tests: stock classes, seeded, with random norm weights and biases.

Norms matter: with the default bias of zero a wrongly placed mask in front of a norm would go unnoticed.
"""

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn

from aptp.codes import ArchitectureCode, PruningSpace

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD21 = SD15 | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
EMOJI = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128, 128),
    "attention_head_dim": (2, 4, 8, 8),
    "cross_attention_dim": 384,
    "use_linear_projection": True,
    "norm_num_groups": 16,
}
TINY_SDXL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
PIXART = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 4,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
    "out_channels": 4,
}


def _randomise_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)


def _build(cls: Any, config: dict[str, Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**config)
        _randomise_norms(model)
    return model.eval()


def unet(seed: int = 0, **config: Any) -> Any:
    """A UNet2DConditionModel of SD 2.1's shape with two blocks (32, 64); keywords override its configuration."""
    return _build(UNet2DConditionModel, UNET | config, seed)


def sdxl(seed: int = 0) -> Any:
    """A UNet of SDXL's shape: deeper transformers, pooled text and time ids."""
    return _build(UNet2DConditionModel, TINY_SDXL, seed)


def pixart(seed: int = 0, **config: Any) -> Any:
    """A diffusion transformer of four blocks."""
    return _build(PixArtTransformer2DModel, PIXART | config, seed)


MODELS = {"unet": unet, "sdxl": sdxl, "pixart": pixart}


def on_meta(cls: Any = UNet2DConditionModel, **config: Any) -> Any:
    """A model of any size without memory."""
    with torch.device("meta"):
        return cls(**config)


def inputs(model: Any, batch: int = 2, size: int = 8, tokens: int = 5, seed: int = 1) -> dict[str, Any]:
    """Random keyword inputs of one forward pass."""
    noise = torch.Generator().manual_seed(seed)
    config = model.config
    latents = torch.randn(batch, config.in_channels, size, size, generator=noise)
    timestep = torch.randint(0, 1000, (batch,), generator=noise)
    if isinstance(model, PixArtTransformer2DModel):
        text = torch.randn(batch, tokens, config.caption_channels, generator=noise)
        return {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text}
    text = torch.randn(batch, tokens, config.cross_attention_dim, generator=noise)
    given: dict[str, Any] = {"sample": latents, "timestep": timestep, "encoder_hidden_states": text}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, generator=noise),
            "time_ids": torch.rand(batch, 6, generator=noise),
        }
    return given


def random_code(space: PruningSpace, kind: str = "all", seed: int = 0) -> ArchitectureCode:
    """Drops about half of the units of one kind of site, or of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.ones(len(space), dtype=torch.bool)
    for site in space.sites:
        if kind in ("all", site.kind):
            drawn = torch.rand(site.units, generator=generator) < 0.5
            if site in space.width:
                drawn[torch.randint(site.units, (1,), generator=generator)] = True
            bits[space.slice_of(site.name)] = drawn
    return ArchitectureCode(space, bits)
