"""Runs of a toy stage on real worker groups: what is undisturbed, interrupted or killed ends the same."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch

from aptp_platform.config import ConfigError
from aptp_platform.storage.store import Store
from aptp_platform.train.trainer import fit, fit_all
from tests.support import toy_spec
from tests.support.toy_spec import ToySpec, losses_of, toy

ray.cloudpickle.register_pickle_by_value(toy_spec)


def run(stage: ToySpec) -> dict[str, Any]:
    return fit(stage, Store.open(stage.folder), "run")


def values_of(summary: dict[str, Any]) -> torch.Tensor:
    return torch.cat([torch.tensor(value).flatten() for value in summary.values()])


def told_of(folder: Path) -> list[dict[str, float]]:
    """What a run told of the batch of all workers."""
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("local_ray")
def test_an_interrupted_run_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = run(toy(tmp_path / "undisturbed", steps=4, every=2))
    (losses,) = losses_of(tmp_path / "undisturbed")
    assert len(losses) == 4

    assert run(toy(tmp_path / "halves", steps=2, every=2)) != undisturbed
    halves = run(toy(tmp_path / "halves", steps=4, every=2, workers=2, zero_stage=2))
    assert torch.allclose(values_of(halves), values_of(undisturbed), rtol=1e-5), (
        "another number of workers, a half each, and another ZeRO stage"
    )
    told = told_of(tmp_path / "halves")
    assert [len(each) for each in losses_of(tmp_path / "halves")] == [2, 2], "it went on behind step 2"
    assert told[0] == told_of(tmp_path / "undisturbed")[0]
    assert told[-1] == pytest.approx(told_of(tmp_path / "undisturbed")[-1], rel=1e-6), "with its rows and noise"

    assert run(toy(tmp_path / "halves", steps=4, every=2)) == halves, "finished: not run again"
    assert len(losses_of(tmp_path / "halves")) == 2
    with pytest.raises(ConfigError, match=r"belong to another config \(note: '', now 'other'\)"):
        run(toy(tmp_path / "halves", steps=6, note="other"))
    tensorboard = tmp_path / "halves" / "tensorboard"
    assert sorted(path.parent.name for path in tensorboard.glob("from-*/events*")) == ["from-00000000", "from-00000002"]
    assert (tensorboard / "config.yaml").read_text() == "note: "

    for part in (tmp_path / "halves").rglob("rank-*.safetensors"):
        os.truncate(part, part.stat().st_size - 1)
    before = sorted((tmp_path / "halves").glob("started-*"))
    longer = toy(tmp_path / "halves", steps=6)
    with pytest.raises(
        ConfigError, match=r"^[^\n]+: this checkpoint is damaged \(rank-00-of-02.safetensors does[^\n]+$"
    ):
        run(replace(longer, training=replace(longer.training, max_failures=3)))
    assert len(sorted((tmp_path / "halves").glob("started-*"))) == len(before) + 1, "no restart of the workers mends it"


@pytest.mark.usefixtures("local_ray")
def test_one_that_failed_beside_others_is_run_again_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {
        name: toy(tmp_path / name, steps=4, every=2, faults=faults, name=name)
        for name, faults in {"sound": (), "weak": ((3, "worker"),)}.items()
    }
    patient = {name: replace(stage, training=replace(stage.training, max_failures=0)) for name, stage in stages.items()}
    sound, weak = fit_all(patient, Store.open(tmp_path / "runs"), 2)
    assert sound == weak
    ((expected,), (before, after)) = (losses_of(tmp_path / name) for name in stages)  # the sound one is not run again
    assert before == expected[:3]
    assert after == expected[-len(after) :], "from its last checkpoint"
    assert "[weak] failed beside the others: once more alone" in capsys.readouterr().out
