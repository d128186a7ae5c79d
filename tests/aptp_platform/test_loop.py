"""Runs of a toy stage on real worker groups: what is undisturbed, interrupted or killed ends the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray.cloudpickle
import toy_stage
from toy_stage import ToyStage, losses_of, toy

from aptp_platform.config import ConfigError
from aptp_platform.storage import Store
from aptp_platform.train.trainer import fit, fit_all

ray.cloudpickle.register_pickle_by_value(toy_stage)


def run(stage: ToyStage) -> object:
    return fit(stage, Store.open(stage.folder), "run")


@pytest.mark.usefixtures("local_ray")
def test_interrupted_and_killed_runs_end_as_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = run(toy(tmp_path / "undisturbed", steps=4, every=2))
    (losses,) = losses_of(tmp_path / "undisturbed")
    assert len(losses) == 4

    assert run(toy(tmp_path / "halves", steps=2, every=2)) != undisturbed
    assert run(toy(tmp_path / "halves", steps=4, every=2)) == undisturbed
    assert losses_of(tmp_path / "halves") == [losses[:2], losses[2:]], "it went on with the rows and noise of step 2"

    assert run(toy(tmp_path / "killed", steps=4, every=2, faults=((3, "worker"),))) == undisturbed
    before, after = losses_of(tmp_path / "killed")
    assert before == losses[:3]
    assert after == losses[-len(after) :]

    assert run(toy(tmp_path / "halves", steps=4, every=2)) == undisturbed, "finished: not run again"
    assert len(losses_of(tmp_path / "halves")) == 2
    with pytest.raises(ConfigError, match=r"belong to another config \(note: '', now 'other'\)"):
        run(toy(tmp_path / "halves", steps=6, note="other"))
    tensorboard = tmp_path / "halves" / "tensorboard"
    assert sorted(path.parent.name for path in tensorboard.glob("from-*/events*")) == ["from-00000000", "from-00000002"]
    assert (tensorboard / "config.yaml").read_text() == "note: "


@pytest.mark.usefixtures("local_ray")
def test_one_that_failed_beside_others_is_run_again_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {
        name: toy(tmp_path / name, steps=4, every=2, faults=faults, name=name)
        for name, faults in {"sound": (), "weak": ((3, "worker"),)}.items()
    }
    patient = {name: replace(stage, training=replace(stage.training, max_failures=0)) for name, stage in stages.items()}
    sound, weak = fit_all(patient, Store.open(tmp_path / "runs"), 2)
    assert sound == weak
    assert [len(losses_of(tmp_path / name)) for name in stages] == [1, 2], "the sound one is not run again"
    assert "[weak] failed beside the others: once more alone" in capsys.readouterr().out
