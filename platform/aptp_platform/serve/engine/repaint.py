"""Images that start from a picture: how much noise it gets, and what a mask keeps of it at every step.

The arithmetic is that of diffusers' `StableDiffusionImg2ImgPipeline`, and of its `StableDiffusionInpaintPipeline` with
a UNet that was not trained for it (four input channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from aptp.latents import encode_images
from aptp_platform.serve.messages import SourceImage


@dataclass(frozen=True)
class Kept:
    """What a masked image keeps: the picture's latents and their noise where `mask` is 0."""

    latents: Float[Tensor, "1 channel height width"]
    noise: Float[Tensor, "1 channel height width"]
    mask: Float[Tensor, "1 1 height width"]

    def restore(
        self, latents: Float[Tensor, "1 channel height width"], scheduler: Any, following: Tensor | None
    ) -> Float[Tensor, "1 channel height width"]:
        """The latents after a step, with the kept part as noisy as at the `following` timestep; None: without noise."""
        own = self.latents if following is None else scheduler.add_noise(self.latents, self.noise, following[None])
        return (1 - self.mask) * own + self.mask * latents


def start_from(
    source: SourceImage, size: tuple[int, int], steps: int, scheduler: Any, vae: Any, generator: torch.Generator
) -> tuple[Float[Tensor, "1 channel height width"], list[Tensor], Kept | None]:
    """The first latents of an image that starts from a picture, the timesteps that are left, and what is kept.

    Args:
        size: (width, height) of the picture and the image.
        steps: of the whole schedule, which `scheduler` was set to; `source` says how many of them are run.
        generator: draws the sample of the autoencoder's posterior, then the noise.
    """
    width, height = size
    pixels = torch.frombuffer(bytearray(source.pixels), dtype=torch.uint8).reshape(1, height, width, 3)
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = encode_images(vae, images, generator).float()
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    skipped = (steps - source.steps_of(steps)) * scheduler.order
    timesteps = list(scheduler.timesteps[skipped:])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    if source.mask is not None and source.strength == 1:
        first = noise * scheduler.init_noise_sigma
    else:
        first = scheduler.add_noise(latents, noise, timesteps[0][None])
    if source.mask is None:
        return first, timesteps, None
    anew = torch.frombuffer(bytearray(source.mask), dtype=torch.uint8).reshape(1, 1, height, width)
    mask = F.interpolate((anew >= 128).float(), size=latents.shape[-2:]).to(latents.device)
    return first, timesteps, Kept(latents, noise, mask)
