"""The paired scores of networks: the same rows and noise, and the distance between two networks' predictions."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from aptp.latents import encode_texts
from aptp.losses import NoiseSchedule
from aptp_platform.config import EvaluateConfig
from aptp_platform.data.heldout import HeldOut, row_generator, row_losses, score_rows
from aptp_platform.experts.score import forward_milliseconds
from aptp_platform.models import PipelineParts
from tests.support import tiny
from tests.support.tiny_pipeline import build_pipeline

ROWS = 5
CONFIG = EvaluateConfig(timesteps=(100, 700), batch_size=2)


@pytest.fixture(scope="module")
def parts() -> PipelineParts:
    pipe = build_pipeline()
    return PipelineParts(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)


@pytest.fixture(scope="module")
def held() -> HeldOut:
    latents = torch.randn(ROWS, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [f"row{row}" for row in range(ROWS)]
    return HeldOut(names, [f"a {name}" for name in names], ["all"] * ROWS, latents, torch.zeros(ROWS, 3))


@torch.no_grad()
def predictions(parts: PipelineParts, unet: UNet2DConditionModel, held: HeldOut, timestep: int) -> torch.Tensor:
    """Every row by itself."""
    schedule, found = NoiseSchedule(parts.scheduler), []
    for row, key in enumerate(held.keys):
        noise, at = torch.randn(1, 4, 8, 8, generator=row_generator(key)), torch.tensor([timestep])
        texts = encode_texts(parts.tokenizer, parts.text_encoder, [held.captions[row]])
        noisy = schedule.noisy(held.latents[row : row + 1], noise, at)
        found.append(unet(noisy, at, encoder_hidden_states=texts).sample)
    return torch.cat(found)


def test_distances_are_between_predictions_at_the_same_rows_noise_and_timesteps(
    parts: PipelineParts, held: HeldOut
) -> None:
    rows, other = list(range(ROWS)), tiny.unet(1)
    teacher = score_rows(CONFIG, parts, parts.unet, held, rows, keep_answers=True)
    assert teacher.distances is None
    same = score_rows(CONFIG, parts, parts.unet, held, rows, compare_with=teacher.answers)
    assert same.distances == pytest.approx(np.zeros(ROWS))
    found = score_rows(CONFIG, parts, other, held, rows, compare_with=teacher.answers)
    expected = [
        (predictions(parts, other, held, at) - predictions(parts, parts.unet, held, at)).square().mean((1, 2, 3))
        for at in CONFIG.timesteps
    ]
    assert found.distances == pytest.approx(torch.stack(expected).mean(0).numpy(), rel=1e-4)
    assert found.losses == pytest.approx(row_losses(CONFIG, parts, other, held, rows))
    assert found.answers == []


def test_a_batch_is_timed_though_there_are_fewer_rows(parts: PipelineParts, held: HeldOut) -> None:
    few, many = (EvaluateConfig(batch_size=size) for size in (2, 64))
    assert 0 < forward_milliseconds(few, parts, parts.unet, held) < forward_milliseconds(many, parts, parts.unet, held)
