"""The teacher's autoencoder: a small `AutoencoderKL`, trained on images alone, with white latents."""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor

from aptp_platform.run.progress import Progress
from examples.emoji.training.workers import Workers, update_average


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoder is shaped and trained."""

    channels: tuple[int, ...] = (16, 32, 64)
    images: int = 48_000  # seen in all, over all workers
    batch_size: int = 32  # per worker
    learning_rate: float = 2e-3
    average_decay: float = 0.995
    permuted_share: float = 0.6
    latent_noise: float = 0.05
    seed: int = 0


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """An untrained autoencoder: 4 latent channels, a reduction by 2 for each channel count after the first."""
    blocks = len(config.channels)
    return AutoencoderKL(
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def train_autoencoder(
    images: UInt8[np.ndarray, "image 3 height width"],
    config: AutoencoderConfig,
    workers: Workers,
) -> AutoencoderKL:
    """Train on `images` and return the averaged weights with whitened latents.

    Two measures against what small, narrow data does to an autoencoder. The colours of emoji lie almost on one
    yellow-blue axis, and a net that finds it first never learns green: most of every batch has its RGB channels
    permuted. Diffusion wants latents of unit covariance: the whitening is folded into the two 1 x 1 convolutions around
    the latents, so the result is a stock autoencoder with a scaling factor of 1.
    """
    torch.manual_seed(config.seed)
    model = build_autoencoder(config)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=1e-4, fused=True)
    steps = config.images // (config.batch_size * workers.count)
    generator = torch.Generator().manual_seed(config.seed * 1000 + workers.rank)
    progress = Progress("autoencoder", steps) if workers.rank == 0 else None
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min((step + 1) / 100, 1.0, 0.02 + 1.6 * (1 - step / steps))
        chosen = torch.randint(len(images), (config.batch_size,), generator=generator)
        batch = to_pixels(torch.from_numpy(images[chosen.numpy()]))
        loss = _reconstruction_loss(model, _permute_colours(batch, config.permuted_share, generator), config, generator)
        loss.backward()
        workers.average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, min(config.average_decay, (1 + step) / (10 + step)))
        rate = (step + 1) * config.batch_size * workers.count / (time.monotonic() - started)
        if progress is not None:
            progress.update(step + 1, **{"loss": loss.item(), "images/s": rate})
    _whiten(average, images)
    return average.eval()


def to_pixels(images: UInt8[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Bytes to the range [-1, 1] that autoencoders read."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode_means(
    model: AutoencoderKL, images: UInt8[np.ndarray, "image 3 height width"]
) -> Float[Tensor, "image c h w"]:
    """The latents' means, 256 images at a time."""
    batches = torch.from_numpy(images).split(256)
    return torch.cat([model.encode(to_pixels(batch)).latent_dist.mean for batch in batches])


def _permute_colours(
    batch: Float[Tensor, "batch 3 height width"], share: float, generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    order = torch.rand(len(batch), 3, generator=generator).argsort(1)
    keep = torch.rand(len(batch), 1, generator=generator) >= share
    order = torch.where(keep, torch.arange(3), order)
    return batch.gather(1, order[:, :, None, None].expand_as(batch))


def _reconstruction_loss(
    model: AutoencoderKL,
    batch: Float[Tensor, "batch 3 height width"],
    config: AutoencoderConfig,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    latents = model.encode(batch).latent_dist.mean
    spread = latents.detach().std((0, 2, 3), keepdim=True)
    noise = torch.randn(latents.shape, generator=generator)
    decoded = model.decode(latents + config.latent_noise * spread * noise).sample
    loss = F.l1_loss(decoded, batch) + 2 * F.mse_loss(decoded, batch)
    for axis in (2, 3):  # edges: people see them first, and a plain pixel loss blurs them
        loss = loss + 0.5 * F.l1_loss(decoded.diff(dim=axis), batch.diff(dim=axis))
    return loss + 1e-4 * latents.square().mean()


@torch.no_grad()
def _whiten(model: AutoencoderKL, images: UInt8[np.ndarray, "image 3 height width"]) -> None:
    latents = encode_means(model, images).movedim(1, -1).flatten(0, -2).double()
    mean = latents.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(latents.T))
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    restore = vectors @ torch.diag(values.sqrt()) @ vectors.T
    channels = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    weight, bias = quant.weight[:channels, :, 0, 0].double(), quant.bias[:channels].double()
    quant.weight[:channels, :, 0, 0] = (whiten @ weight).float()
    quant.bias[:channels] = (whiten @ (bias - mean)).float()
    quant.weight[channels:] = 0  # the variance was never trained: a small constant makes encoding deterministic
    quant.bias[channels:] = -8.0
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ mean).float()
    post.weight[:, :, 0, 0] = (weight @ restore).float()
