"""The sweep: which trials nobody beats, and one real trial with its own folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from aptp_platform.experts.tune import pareto_set, tune
from tests.support.tiny_run import tiny_run

POINTS = st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), min_size=1, max_size=8)


@given(POINTS)
def test_the_pareto_set_is_what_nobody_beats(points: list[tuple[float, float]]) -> None:
    kept = pareto_set(points)
    cheapest = min(points)
    assert points.index(cheapest) in kept
    for index, (ratio, loss) in enumerate(points):
        better = [p for p in points if p != (ratio, loss) and p[0] <= ratio and p[1] <= loss]
        assert (index in kept) == (not better)


@pytest.mark.usefixtures("local_ray")
def test_a_trial_runs_in_its_own_folder_and_only_once(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, steps=2)
    config = replace(config, tune=replace(config.tune, num_codes=(2,), trials=1))
    summary = tune(config)
    folder = Path(config.root) / "tune" / "codes-2-budget-0.8"
    assert summary == {"trials": 1, "pareto": [str(folder)]}
    results = json.loads((folder.parent / "results.json").read_text())
    (trial,) = results["trials"]
    assert trial["ratio"] == pytest.approx(0.8, abs=0.05)
    assert (folder / "cut" / "01" / "code.json").exists()
    assert not (Path(config.root) / "pruned").exists()

    (folder / "cut" / "01" / "code.json").unlink()
    assert tune(config) == summary
    assert not (folder / "cut" / "01" / "code.json").exists(), "finished: not run again"
