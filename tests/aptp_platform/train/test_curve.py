"""The held-out extra loss: what a gated network is measured at is what its slices lose."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aptp.baselines import random_code
from aptp.cost import cost_table
from aptp.sites import read_space
from aptp.slicing import slice_unet
from aptp_platform.config import TrainingConfig
from aptp_platform.data.heldout import read_held_out, row_losses
from aptp_platform.models import load_pipeline_parts
from aptp_platform.storage.store import Store
from aptp_platform.train.curve import Curve, Measured
from aptp_platform.train.heldout_test import HeldOutTest
from aptp_platform.train.specs import result_of
from tests.support.tiny_run import tiny_run


def test_a_row_under_its_code_loses_what_the_slice_loses(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    parts = load_pipeline_parts(config.model, config.storage)
    space = read_space(parts.unet)
    table = cost_table(parts.unet, space, latent_size=(8, 8), num_text_tokens=5)
    codes = [random_code(space, table, 0.7, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    masks, routes = torch.stack([code.mask for code in codes]), [0, 1, 1, 0, 1]
    test = HeldOutTest(config, parts, len(routes))
    found = test.under_codes(parts.unet, space, masks, table.ratio(masks), routes)

    held, every = read_held_out(config, len(routes)), list(range(len(routes)))
    sliced = [row_losses(config.evaluate, parts, slice_unet(parts.unet, code), held, every) for code in codes]
    teacher = row_losses(config.evaluate, parts, parts.unet, held, every)
    expected = np.choose(routes, sliced) - teacher
    assert abs(expected.mean()) > 1e-4
    assert found.extra_loss == pytest.approx(expected.mean(), rel=1e-3)
    assert found.rows == 5
    assert found.cost_ratio == pytest.approx(table.ratio(masks)[routes].mean().item())

    alone = test.of_network(slice_unet(parts.unet, codes[1]), [1, 2, 4], 0.7)
    assert alone.extra_loss == pytest.approx(expected[[1, 2, 4]].mean(), rel=1e-3)
    assert test.of_network(parts.unet, every, 1.0).extra_loss == pytest.approx(0, abs=1e-9)
    taught = HeldOutTest(config, parts, len(routes), dict.fromkeys(held.keys, 0.5))
    assert taught.of_network(parts.unet, every, 1.0).extra_loss == pytest.approx(teacher.mean() - 0.5), "not measured"


def test_a_checkpoint_serves_a_run_that_measures_and_one_that_does_not() -> None:
    assert result_of(TrainingConfig(heldout_rows=5)) == result_of(TrainingConfig())


def test_a_training_that_goes_on_keeps_the_points_up_to_there(tmp_path: Path) -> None:
    def curve() -> Curve:
        return Curve(Store.open(tmp_path), "prune", lambda: Measured(0.1, 3, 0.7))

    first = curve()
    for step in (2, 4, 6):
        first.add(step)
    again = curve()
    again.go_on(4)
    assert again.add(8).step == 8
    assert [point["step"] for point in json.loads((tmp_path / "prune.json").read_text())] == [2, 4, 8]
    fresh = curve()
    fresh.go_on(0)
    assert fresh.points == []
