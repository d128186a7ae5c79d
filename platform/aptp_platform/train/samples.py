"""Images of a run's fixed prompts, each from its own seed, which TensorBoard shows while a training runs."""

from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from aptp_platform.config import SamplesConfig
from aptp_platform.models import PipelineParts


@torch.no_grad()
def draw(
    unet: Any, parts: PipelineParts, config: SamplesConfig, size: int
) -> UInt8[np.ndarray, "prompt height width 3"]:
    """One image per prompt by the stock sampler; prompt i has seed i whatever the network and the step.

    Args:
        size: the images' height and width, that of the training images.
    """
    parts.vae.to(unet.device)
    pipeline = parts.pipeline(unet)
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
