"""The paired denoising loss on held-out rows: any two networks see the same captions, noise and timesteps.

A row's caption, noise and timesteps depend on its key alone: not on the network, on its neighbours or on the batch.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from aptp.latents import encode_texts
from aptp.losses import NoiseSchedule
from aptp.metrics import paired_denoising_loss
from aptp_platform.config import ConfigError, EvaluateConfig, RunConfig
from aptp_platform.data.encoded import choose_caption, read_encoded
from aptp_platform.models import PipelineParts
from aptp_platform.run.layout import HELD_OUT_ROWS, home


@dataclass(frozen=True)
class HeldOut:
    """Captioned images that no stage has trained on, ordered by a hash of their keys."""

    keys: list[str]
    captions: list[str]
    kinds: list[str]
    latents: Float[Tensor, "row channel height width"]
    embeddings: Float[Tensor, "row dim"]


def read_held_out(config: RunConfig, limit: int) -> HeldOut:
    """At most `limit` rows of the run's `encoded/heldout`, one caption of each."""
    rows = read_encoded(home(config, "encode").join(HELD_OUT_ROWS))
    if not rows:
        raise ConfigError(
            f"data.heldout: {config.data.heldout!r}: no encoded row came of it; name shards that training does not see"
        )
    rows = sorted(rows, key=lambda row: hashlib.sha256(row["key"].encode()).digest())[:limit]
    chosen = [choose_caption(row["key"], len(row["captions"]), 0, config.seed) for row in rows]
    return HeldOut(
        [row["key"] for row in rows],
        [row["captions"][index] for row, index in zip(rows, chosen, strict=True)],
        [json.loads(row["tags"]).get("kind", "all") for row in rows],
        torch.from_numpy(np.stack([row["latents"] for row in rows])).float(),
        torch.from_numpy(np.stack([row["embeddings"][i] for row, i in zip(rows, chosen, strict=True)])).float(),
    )


@torch.no_grad()
def row_losses(
    config: EvaluateConfig, parts: PipelineParts, unet: nn.Module, held: HeldOut, rows: list[int], noise_number: int = 0
) -> Float[np.ndarray, " row"]:
    """Each row's loss under `unet`: the mean over `config.timesteps`, at the row's noise of that number."""
    device = next(unet.parameters()).device
    schedule, text_encoder = NoiseSchedule(parts.scheduler).to(device), parts.text_encoder.to(device)
    losses = []
    for batch in batches_of(rows, config.batch_size):
        latents = held.latents[batch].to(device)
        texts = encode_texts(parts.tokenizer, text_encoder, [held.captions[row] for row in batch])
        generators = [row_generator(held.keys[row], noise_number) for row in batch]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        at = [torch.full((len(batch),), timestep, device=device) for timestep in config.timesteps]
        each = [paired_denoising_loss(unet, schedule, latents, texts, noise.to(device), timesteps) for timesteps in at]
        losses.append(torch.stack(each).mean(0).cpu())
    return torch.cat(losses).numpy().astype(np.float64)


def row_generator(key: str, number: int = 0) -> torch.Generator:
    """A noise of the row with this key."""
    digest = hashlib.sha256(f"{number} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def batches_of(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
