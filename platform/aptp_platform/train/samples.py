"""Pictures of a run's fixed prompts, each from its own seed: what TensorBoard shows changing while a stage trains."""

from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import UInt8

from aptp_platform.config import SamplesConfig
from aptp_platform.models import Parts


@torch.no_grad()
def draw(unet: Any, parts: Parts, config: SamplesConfig, size: int) -> UInt8[np.ndarray, "prompt height width 3"]:
    """One picture a prompt by the stock sampler; prompt i has seed i whatever the network and the step.

    Args:
        size: the pictures' height and width, that of the training images.
    """
    pipeline = StableDiffusionPipeline(
        unet=unet, vae=parts.vae.to(unet.device), text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
        scheduler=parts.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        list(config.prompts),
        height=size,
        width=size,
        num_inference_steps=config.inference_steps,
        guidance_scale=config.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(config.prompts))],
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)
