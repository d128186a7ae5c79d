"""Scores of runs that nobody trained: their differences are known, so that a comparison's answers are."""

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from aptp.baselines import random_code
from aptp.cost import cost_table
from aptp.sites import read_space
from aptp_platform.experts.evidence.arms import TEACHER, Network
from aptp_platform.experts.evidence.scores import RunScores
from tests.support import tiny

ROWS = 60
KINDS = ("face", "food", "sign")
STYLES = ("noto", "twemoji")


def made_up_scores(
    costs: tuple[float, ...],
    extra: tuple[float, ...] | float = 0.1,
    *,
    budget: float = 0.4,
    seed: int = 0,
    rows: int = ROWS,
    singles: dict[str, float] | None = None,
    by_need: float = 0.0,
) -> RunScores:
    """A run whose prompts take turns over its codes.

    Args:
        costs: one per code. extra: what each code loses to the teacher on every prompt, up to noise of 0.002.
        singles: baselines at the budget, with what they lose. by_need: what a unit of need (by kind: 0, 1, 2) adds.
    """
    rng = np.random.default_rng(100 * seed + len(costs))
    teacher = np.random.default_rng(seed).uniform(0.2, 0.4, rows)
    kinds = [KINDS[row % len(KINDS)] for row in range(rows)]
    need = by_need * np.array([KINDS.index(kind) for kind in kinds], dtype=float)

    def network(cost: float, lost: float, steps: int) -> Network:
        noises = teacher + lost + need + rng.normal(0, 0.002, (2, rows))
        return Network(noises, np.full(rows, lost / 2), cost, 10 * cost, steps)

    extras = np.broadcast_to(extra, len(costs))
    networks = {TEACHER: Network(np.stack([teacher, teacher]), np.zeros(rows), 1.0, 10.0)}
    networks |= {
        f"{code:02d}": network(cost, lost, 300) for code, (cost, lost) in enumerate(zip(costs, extras, strict=True))
    }
    networks |= {name: network(budget, lost, 300) for name, lost in (singles or {}).items()}
    return RunScores(
        budget=budget,
        seed=seed,
        steps_shared=100,
        keys=[f"row{row}" for row in range(rows)],
        captions=[f"{STYLES[row % 2]} emoji of a {kinds[row]}, number {row}" for row in range(rows)],
        kinds=kinds,
        embeddings=np.random.default_rng(1).normal(0, 0.1, (rows, 4)) + 3 * (np.arange(rows) % 2)[:, None],
        codes=np.arange(rows) % len(costs),
        predicted=None,
        networks=networks,
        device="cpu",
        batch_size=16,
        timesteps=[100, 400],
        extractor="lite0",
    )


def with_images(scores: RunScores, arms: tuple[str, ...], drawn: int = 24) -> RunScores:
    """The same with features, image scores, pictures and architectures, all made up."""
    unet, rng = tiny.unet(), np.random.default_rng(scores.seed)
    space = read_space(unet)
    table = cost_table(unet, space, latent_size=(8, 8), num_text_tokens=5)
    generator = torch.Generator().manual_seed(scores.seed)
    codes = [random_code(space, table, max(0.45, expert.cost), generator=generator) for expert in scores.experts]
    return replace(
        scores,
        features={arm: rng.normal(size=(drawn, 5)) for arm in arms},
        real=rng.normal(size=(2 * drawn, 5)),
        image_scores={arm: {"fd_lite0": None, "cmmd_lite0": float(rng.uniform(1, 2))} for arm in arms},
        pictures={arm: [_picture(arm, row) for row in range(drawn)] for arm in arms},
        architectures=codes,
    )


def _picture(arm: str, row: int) -> bytes:
    image = Image.new("RGB", (64, 64), (40 * row % 256, 90 * row % 256, 160))
    ImageDraw.Draw(image).text((2, 2), f"{arm[:9]}\n{row}", fill="white")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
