"""The paired denoising loss on held-out rows: any two networks see the same captions, noise and timesteps.

A row's caption, noise and timesteps depend on its key alone: not on the network, on its neighbours or on the batch.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from aptp.latents import encode_texts
from aptp.losses import NoiseSchedule, per_sample_error
from aptp.metrics import paired_answer
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


@dataclass(frozen=True)
class RowScores:
    """A network on some rows.

    distances: mean squared differences from given answers, if any were given. answers: the network's predictions, one
    tensor per batch and timestep in this order, if they were to be kept.
    """

    losses: Float[np.ndarray, " row"]
    distances: Float[np.ndarray, " row"] | None
    answers: list[Float[Tensor, "batch channel height width"]]


def row_losses(
    config: EvaluateConfig, parts: PipelineParts, unet: nn.Module, held: HeldOut, rows: list[int], noise_number: int = 0
) -> Float[np.ndarray, " row"]:
    """Each row's loss under `unet`: the mean over `config.timesteps`, at the row's noise of that number."""
    return score_rows(config, parts, unet, held, rows, noise_number).losses


@torch.no_grad()
def score_rows(
    config: EvaluateConfig,
    parts: PipelineParts,
    unet: nn.Module,
    held: HeldOut,
    rows: list[int],
    noise_number: int = 0,
    *,
    keep_answers: bool = False,
    compare_with: Sequence[Float[Tensor, "batch channel height width"]] = (),
) -> RowScores:
    """Each row's loss, as `row_losses` gives it, and its distance from another network's answers.

    Args:
        compare_with: what the other network's scoring of the same rows at the same noise kept. Means over timesteps.
    """
    device = next(unet.parameters()).device
    schedule, text_encoder = NoiseSchedule(parts.scheduler).to(device), parts.text_encoder.to(device)
    losses, distances, answers, others = [], [], [], iter(compare_with)
    for batch in batches_of(rows, config.batch_size):
        latents = held.latents[batch].to(device)
        texts = encode_texts(parts.tokenizer, text_encoder, [held.captions[row] for row in batch])
        generators = [row_generator(held.keys[row], noise_number) for row in batch]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        lost, far = [], []
        for timestep in config.timesteps:
            at = torch.full((len(batch),), timestep, device=device)
            answer, target = paired_answer(unet, schedule, latents, texts, noise.to(device), at)
            lost.append(per_sample_error(answer, target))
            if compare_with:
                far.append(per_sample_error(answer, next(others).to(device)))
            if keep_answers:
                answers.append(answer.cpu())
        losses.append(torch.stack(lost).mean(0).cpu())
        if far:
            distances.append(torch.stack(far).mean(0).cpu())
    joined = _joined(distances) if distances else None
    return RowScores(_joined(losses), joined, answers)


def _joined(parts: list[Tensor]) -> Float[np.ndarray, " row"]:
    return torch.cat(parts).numpy().astype(np.float64)


def row_generator(key: str, number: int = 0) -> torch.Generator:
    """A noise of the row with this key."""
    digest = hashlib.sha256(f"{number} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def batches_of(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
