"""Runs of a toy stage on real worker groups: what is undisturbed, interrupted or killed ends the same."""

import json
from pathlib import Path

import pytest
import ray.cloudpickle
import toy_stage
from toy_stage import ToyStage, toy

from aptp_platform.config import ConfigError
from aptp_platform.storage import Store
from aptp_platform.train.trainer import fit

ray.cloudpickle.register_pickle_by_value(toy_stage)


def run(stage: ToyStage) -> object:
    return fit(stage, Store.open(stage.folder), "run")


def losses_of(folder: Path) -> list[dict[str, float]]:
    """All losses that processes in `folder` computed, in the order of their start."""
    logs = sorted(folder.glob("losses-*.jsonl"), key=lambda log: log.stat().st_mtime)
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


@pytest.mark.usefixtures("local_ray")
def test_interrupted_and_killed_runs_end_as_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = run(toy(tmp_path / "undisturbed", steps=4, every=2))
    losses = losses_of(tmp_path / "undisturbed")
    assert len(losses) == 4

    assert run(toy(tmp_path / "halves", steps=2, every=2)) != undisturbed
    assert run(toy(tmp_path / "halves", steps=4, every=2)) == undisturbed
    assert losses_of(tmp_path / "halves") == losses, (
        "the second half began at step 2, with the rows and noise of step 2"
    )

    assert run(toy(tmp_path / "killed", steps=4, every=2, kill_at=3)) == undisturbed
    assert (tmp_path / "killed" / "killed").exists()
    assert losses_of(tmp_path / "killed")[-1] == losses[-1]

    assert run(toy(tmp_path / "halves", steps=4, every=2)) == undisturbed, "finished: not run again"
    assert len(losses_of(tmp_path / "halves")) == 4
    with pytest.raises(ConfigError, match=r"belong to another config \(note: '', now 'other'\)"):
        run(toy(tmp_path / "halves", steps=6, note="other"))
    assert list((tmp_path / "halves" / "tensorboard").glob("from-*/events*"))
