"""Comparisons of runs whose differences are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aptp_platform.experts.evidence.arms import ORACLE, RANDOM, ROUTED, TEACHER
from aptp_platform.experts.evidence.scores import RunScores, load_scores
from aptp_platform.experts.evidence.trials import ArmRun
from aptp_platform.experts.experiment.comparison import compare
from tests.support.made_up_scores import KINDS, STYLES, made_up_scores, with_images

COSTS = (0.3, 0.5)


def runs(seed: int = 0, budget: float = 0.4) -> list[ArmRun]:
    costs = (budget - 0.1, budget + 0.1)
    method = made_up_scores(costs, (0.08, 0.04), seed=seed, budget=budget)
    one = made_up_scores((budget,), 0.12, seed=seed, budget=budget, singles={"uniform": 0.24})
    return [ArmRun(ROUTED, method), ArmRun("one_code", one)]


def test_differences_and_ratios_over_budgets_and_seeds() -> None:
    found = compare([*runs(0), *runs(1), *runs(0, 0.6), *runs(1, 0.6)])
    assert found["seeds"] == [0, 1]
    assert list(found["budgets"]) == ["0.4", "0.6"]
    here = found["budgets"]["0.4"]
    assert list(here["arms"]) == [TEACHER, ROUTED, RANDOM, ORACLE, "one_code", "uniform"]
    assert here["arms"][TEACHER]["extra_loss"] == 0
    assert here["arms"][ROUTED]["extra_loss"] == pytest.approx(0.06, abs=0.001)
    assert here["arms"]["uniform"]["cost_ratio"] == pytest.approx(0.4)
    assert here["arms"]["one_code"]["teacher_distance"] == pytest.approx(0.06)
    assert here["arms"][ROUTED]["ms"] == pytest.approx(4.0)
    assert [here["arms"][name]["steps"] for name in (ROUTED, "one_code", "uniform")] == [700, 400, 300]
    minus = here["routed_minus"]["one_code"]
    assert minus["mean"] == pytest.approx(-0.06, abs=0.001)
    assert minus["95"][0] < minus["mean"] < minus["95"][1] < 0
    assert minus["ratio"] == pytest.approx(0.5, abs=0.01)
    assert minus["ratio_95"][0] < 0.5 < minus["ratio_95"][1] < 0.7
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_oracle_gap_is_closed_by_routing_as_the_oracle_does() -> None:
    """The prompts of code 1 need it; the router of the first run knows, that of the second is as wrong as can be."""
    method = made_up_scores(COSTS, 0.0)
    rows = np.arange(len(method.keys)) % 2
    extra = np.where(rows == 1, 0.2, 0.0) + np.zeros((2, 1))
    networks = dict(method.networks)
    networks["00"] = replace(networks["00"], losses=networks[TEACHER].losses + extra)
    networks["01"] = replace(networks["01"], losses=networks[TEACHER].losses)
    knows = replace(method, networks=networks)
    gap = compare([ArmRun(ROUTED, knows)])["budgets"]["0.4"]["oracle_gap"]
    assert gap["closed"] == pytest.approx(1)
    assert gap["routed_minus_oracle"]["mean"] == pytest.approx(0, abs=1e-9)
    assert gap["random_minus_oracle"]["mean"] == pytest.approx(0.05)
    wrong = replace(knows, codes=1 - rows)
    assert compare([ArmRun(ROUTED, wrong)])["budgets"]["0.4"]["oracle_gap"]["closed"] == pytest.approx(-1)


def test_capacity_that_follows_need_and_codes_that_follow_the_template() -> None:
    method = made_up_scores((0.2, 0.4, 0.6), (0.1, 0.1, 0.1), by_need=0.1)
    found = compare([ArmRun(ROUTED, method)])["budgets"]["0.4"]
    assert found["need_capacity"]["spearman"] > 0.85
    assert found["need_capacity"]["95"][0] > 0.8
    kinds = found["need_capacity"]["by_kind"]
    assert [kinds[kind]["cost_ratio"] for kind in KINDS] == pytest.approx([0.2, 0.4, 0.6])
    agreement = found["agreement"]
    assert agreement["kinds"] == pytest.approx(1)
    assert agreement["template"] == pytest.approx(0, abs=0.05)
    two = compare([ArmRun(ROUTED, made_up_scores(COSTS))])["budgets"]["0.4"]["agreement"]
    assert two["template"] == two["kmeans_template"] == pytest.approx(1)
    assert len(STYLES) == 2


def spoil(scores: RunScores) -> RunScores:
    losses = scores.networks["00"].losses.copy()
    losses[0, 3] = np.nan
    return replace(scores, networks=scores.networks | {"00": replace(scores.networks["00"], losses=losses)})


def shifted(scores: RunScores) -> RunScores:
    teacher = scores.networks[TEACHER]
    return replace(scores, networks=scores.networks | {TEACHER: replace(teacher, losses=1.1 * teacher.losses)})


def test_what_may_not_be_compared_is_named() -> None:
    method, one = runs()
    refused = {
        r"one_code at budget 0.4, seed 0: 1 of 120 numbers are not finite in the losses of network 00": [
            method, ArmRun("one_code", spoil(one.scores)),
        ],
        r"one_code: costs 0.4300 of the full model as routed at seed 0, more than 1% off the budget, 0.4": [
            method, ArmRun("one_code", made_up_scores((0.43,))),
        ],
        r"one_code at budget 0.4, seed 0: its held-out rows .* differ from those of routed": [
            method, ArmRun("one_code", made_up_scores((0.4,), rows=40)),
        ],
        r"its timesteps .* differ": [method, ArmRun("one_code", replace(one.scores, timesteps=[5]))],
        r"one_code .* its losses of the teacher \(model.pipeline\) differ": [
            method, ArmRun("one_code", shifted(one.scores)),
        ],
        r"routed: no run at budget 0.4, seed 0": [one],
        r"one_code at budget 0.4, seed 0: is there twice": [method, one, one],
        r"one_code: is not there at every seed of budget 0.4 \(seed 0 differs from 1\)": [
            method, ArmRun("one_code", made_up_scores((0.4,))), ArmRun(ROUTED, made_up_scores(COSTS, seed=1)),
        ],
        r"uniform: is an arm of two runs at budget 0.4, seed 0; leave it out of cut.baselines": [
            method, one, ArmRun("other", one.scores),
        ],
        r"there is no run": [],
    }  # fmt: skip
    for message, given in refused.items():
        with pytest.raises(ValueError, match=message) as caught:
            compare(given)
        assert "\n" not in str(caught.value)
    loose = compare([method, ArmRun("one_code", made_up_scores((0.43,)))], tolerance=0.1)
    assert loose["budgets"]["0.4"]["arms"]["one_code"]["cost_ratio"] == pytest.approx(0.43)


def test_scores_are_the_same_after_a_round_trip(tmp_path: Path) -> None:
    scores = with_images(made_up_scores(COSTS, singles={"uniform": 0.2}), (TEACHER, ROUTED, "uniform"))
    scores.save(tmp_path)
    again = load_scores(tmp_path)
    assert compare([ArmRun(ROUTED, again)]) == compare([ArmRun(ROUTED, scores)])
    assert again.pictures == scores.pictures
    assert again.architectures == scores.architectures
    assert {path.name for path in tmp_path.iterdir()} == {"scores.safetensors", "scores.json"}
    bare = made_up_scores(COSTS)
    bare.save(tmp_path)
    assert load_scores(tmp_path).pictures == {}
    (tmp_path / "scores.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99: must be 1"):
        load_scores(tmp_path)
    (tmp_path / "scores.json").unlink()
    with pytest.raises(ValueError, match=r"holds no scores.json; run the evaluate job"):
        load_scores(tmp_path)


def test_image_scores_are_there_where_every_seed_has_them() -> None:
    pair = [ArmRun(ROUTED, with_images(made_up_scores(COSTS, seed=seed), (TEACHER, ROUTED))) for seed in (0, 1)]
    facts = compare(pair)["budgets"]["0.4"]["arms"][ROUTED]
    expected = np.mean([run.scores.image_scores[ROUTED]["cmmd_lite0"] for run in pair])
    assert facts["cmmd_lite0"] == pytest.approx(expected)
    assert facts["fd_lite0"] is facts["fid"] is facts["clip_score"] is None
