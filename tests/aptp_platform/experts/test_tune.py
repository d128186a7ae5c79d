"""The sweep: what is searched, stopped and chosen; and a real one with a trial that fails and a second start."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import load_config, with_fields
from aptp_platform.experts.sweep.choice import choose, falls_behind, pareto_set
from aptp_platform.experts.sweep.outcome import chosen_config
from aptp_platform.experts.sweep.record import Trial, facts_of, read_trials, seconds_inside, write_trial
from aptp_platform.experts.sweep.search import Proposals
from aptp_platform.experts.sweep.space import Range, Values, holds, points, read_space, trial_name
from aptp_platform.experts.tune import tune
from aptp_platform.storage.store import Store
from tests.support.tiny_run import tiny_run

DEMO = Path(__file__).parents[3] / "jobs/configs/demo.yaml"
RATE, LENGTH = "prune.run.learning_rate", "prune.run.steps"


@dataclass(frozen=True)
class Point:
    cost_ratio: float
    extra_loss: float


POINTS = st.lists(st.builds(Point, st.integers(0, 5).map(float), st.integers(0, 5).map(float)), min_size=1, max_size=8)


def demo(**tune: Any) -> RunConfig:
    config = load_config(DEMO)
    return replace(config, tune=replace(config.tune, num_codes=(2, 4), budgets=(0.65, 0.8), search={}, **tune))


def searching(search: Mapping[str, Any]) -> RunConfig:
    config = demo()
    return replace(config, tune=replace(config.tune, search=dict(search)))


def settings(codes: int, budget: float, **others: Any) -> dict[str, Any]:
    return {"router.num_codes": codes, "router.budget": budget, **others}


def test_the_space_is_what_the_config_says() -> None:
    rates, lengths = {"low": "1e-3", "high": 0.1, "log": True}, {"low": 100, "high": 300}
    space = read_space(searching({RATE: rates, LENGTH: lengths, "space.depth": ["last"]}))
    assert space["router.num_codes"] == Values((2, 4))
    assert space[RATE] == Range(0.001, 0.1, log=True, whole=False), "YAML reads 1e-3 as text"
    assert space[LENGTH] == Range(100, 300, log=False, whole=True)
    assert points(space) is None
    every = points(read_space(searching({"router.routing": ["need", "similarity", "need"]})))
    assert every is not None
    assert len(every) == 8, "a value that is named twice is one"
    assert len({trial_name(point) for point in every}) == 8
    assert trial_name(settings(4, 0.65)) == "codes-4-budget-0.65"
    assert holds(read_space(demo()), settings(4, 0.65))
    assert not holds(read_space(demo()), settings(3, 0.65))


@pytest.mark.parametrize(
    ("search", "line"),
    [
        ({"prune.run.learning_rat": [1]}, r"tune.search.prune.run.learning_rat: .*mean prune.run.learning_rate\?"),
        ({"prune.rum.steps": [1]}, r"tune.search.prune.rum.steps: prune.rum: unknown key; did you mean prune.run\?"),
        ({LENGTH: ["many"]}, "tune.search.prune.run.steps: prune.run.steps: 'many': must be a valid integer"),
        ({RATE: {"low": -1.0, "high": 0.1}}, f"tune.search.{RATE}.low: {RATE}: -1.0: must be greater than 0"),
        ({RATE: {"low": 0.2, "high": 0.1}}, f"tune.search.{RATE}: low 0.2 must be below high 0.1"),
        ({RATE: {"from": 0.2}}, f"tune.search.{RATE}: .*: a range has low, high"),
        ({RATE: 0.1}, f"tune.search.{RATE}: 0.1: write a list of values"),
        ({RATE: []}, f"tune.search.{RATE}: holds no value"),
        ({"router.initial_logit": {"low": 0.0, "high": 1.0, "log": True}}, "tune.search.router.initial_logit.low: 0:"),
        ({"router.routing": {"low": "need", "high": "similarity"}}, "tune.search.router.routing.low: 'need': only a"),
        ({"prune.run": [{}]}, "tune.search.prune.run: is a section; name one of its fields"),
        ({"router.budget": [0.5]}, "tune.search.router.budget: this field has a list of its own: set tune.budgets"),
        ({"finetune.run.steps": [5]}, "tune.search.finetune.run.steps: a trial does not depend on it"),
        ({"prune.objective.budget": [0.5]}, "tune.search.prune.objective.budget: .*unknown key; router.budget sets it"),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_line(search: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{line}[^\n]*$"):
        read_space(searching(search))


@given(POINTS)
def test_the_pareto_set_is_what_nobody_beats(found: list[Point]) -> None:
    kept = pareto_set(found)
    for index, own in enumerate(found):
        beaten = [p for p in found if p != own and p.cost_ratio <= own.cost_ratio and p.extra_loss <= own.extra_loss]
        assert (index in kept) == (not beaten)
    index, _ = choose(found, 3.0)
    assert index in kept
    fitting = [point.extra_loss for point in found if point.cost_ratio <= 3.0]
    assert not fitting or found[index].extra_loss == min(fitting)


def test_costs_that_differ_by_less_than_pruning_hits_them_are_one() -> None:
    assert pareto_set([Point(0.799, 0.02), Point(0.8, 0.01)]) == [1]


def test_without_a_trial_within_the_budget_the_knee_is_chosen() -> None:
    found = [Point(0.7, 1.0), Point(0.75, 0.2), Point(1.0, 0.0)]
    index, rule = choose(found, 0.5)
    assert index == 1
    assert "knee" in rule
    assert choose(found, 0.76) == (1, "the lowest held-out extra loss of the Pareto trials within router.budget 0.76")


def test_a_trial_falls_behind_if_most_others_are_better_at_no_higher_cost() -> None:
    own = Point(0.7, 0.05)
    assert falls_behind(own, [Point(0.7, 0.04)])
    assert not falls_behind(own, []), "the first of its budget"
    assert not falls_behind(own, [Point(0.7, 0.04), Point(0.7, 0.06)]), "half is not most"
    assert falls_behind(own, [Point(0.7, 0.04), Point(0.7, 0.06), Point(0.6, 0.04)])
    assert not falls_behind(own, [Point(0.95, 0.001)]), "it has pruned less so far, so it loses less"


def test_what_an_earlier_start_has_found_counts_as_long_as_nothing_it_depends_on_has_changed(tmp_path: Path) -> None:
    config, folder = demo(), Store.open(tmp_path)
    done = Trial(settings(4, 0.65), "finished", 0.02, 0.66, [1.0], {}, "", 1.0, 5.0)
    failed = Trial(settings(2, 0.65), "failed", reason="no disk", started=2.0, ended=7.0)
    for trial in (done, failed):
        write_trial(folder.join(trial.name), trial, facts_of(config, trial.settings, "e"))
    assert read_trials(folder, config, read_space(config), "e") == [failed, done]
    assert seconds_inside([done, failed]) == 6.0, "while both ran it counts once"

    more = replace(config, tune=replace(config.tune, trials=9, choose="x"), finetune=replace(config.finetune))
    more = replace(more, prune=replace(more.prune, run=replace(more.prune.run, workers=1, checkpoint_every=7)))
    assert read_trials(folder, more, read_space(more), "e") == [failed, done], "none of it changes a trial's result"
    longer = with_fields(config, {LENGTH: 201})
    assert read_trials(folder, longer, read_space(longer), "e") == []
    assert read_trials(folder, config, read_space(config), "other rows") == []
    narrower = replace(config, tune=replace(config.tune, budgets=(0.65,), num_codes=(2,)))
    assert read_trials(folder, narrower, read_space(narrower), "e") == [failed]


def test_proposals_repeat_no_trial_and_end_with_the_space() -> None:
    space = read_space(demo())
    done = Trial(settings(4, 0.65), "finished", 0.02, 0.66)
    stopped = Trial(settings(2, 0.8), "stopped", 0.5, 0.97)
    search = Proposals(space, 0, 6, [done, stopped], [settings(2, 0.65)], lambda name: None)
    assert [tuple(trial.values) for trial in search._study.trials] == [(0.02, 0.66), (0.5, 0.8)], "it knows them"
    first = search.suggest("a")["settings"]
    assert first == settings(2, 0.65), "what was interrupted comes first"
    assert search.suggest("b")["settings"] == settings(4, 0.8), "the only point that is left"
    assert search.suggest("c") == Proposals.FINISHED
    search.on_trial_complete("a", error=True)
    ranged = Proposals(read_space(searching({RATE: {"low": 0.01, "high": 0.1}})), 0, 6, [], [], lambda name: None)
    rates = [ranged.suggest(str(number))["settings"][RATE] for number in range(4)]
    assert all(0.01 <= rate <= 0.1 for rate in rates)
    assert len(set(rates)) == 4


def test_the_chosen_config_is_read_back_as_it_was_chosen(tmp_path: Path) -> None:
    config = searching({RATE: {"low": 0.01, "high": 0.1}})
    trial = Trial(settings(2, 0.8, **{RATE: 0.0123456789}), "finished", 0.02, 0.8)
    text = chosen_config(replace(config, tune=replace(config.tune, choose=trial.name)), trial, "a rule")
    assert text.splitlines()[0] == f"# Trial {trial.name} of a sweep: a rule."
    (tmp_path / "chosen.yaml").write_text(text)
    read = load_config(tmp_path / "chosen.yaml")
    assert read == with_fields(config, trial.settings)
    assert (read.router.num_codes, read.router.budget, read.prune.run.learning_rate) == (2, 0.8, 0.0123456789)


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_with_a_trial_that_fails_and_a_second_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_run(tmp_path, steps=4)
    config = replace(config, root="run", model=replace(config.model, pipeline="model"))  # as the demo's: relative
    config = replace(config, tune=replace(config.tune, num_codes=(2,), budgets=(0.05,)))
    with pytest.raises(ConfigError, match=r"^tune.budgets: 0\.05: this UNet cannot be pruned below [^\n]*$"):
        tune(config)

    # No cluster here has room for the second trial's worker.
    search = {"prune.run.cpus_per_worker": [0.5, 64.0]}
    config = replace(config, tune=replace(config.tune, budgets=(0.8,), trials=2, rows=16, search=search))
    summary = tune(config)
    assert {state: summary[state] for state in ("finished", "stopped", "failed")} == {
        "finished": 1, "stopped": 0, "failed": 1,
    }  # fmt: skip
    folder = Path(config.root) / "tune"
    results = json.loads((folder / "results.json").read_text())
    found, failed = results["trials"]
    assert failed["reason"].startswith("prune.run.workers: 1: with prune.run.cpus_per_worker 64 they need 64 CPU")
    assert found["cost_ratio"] == pytest.approx(0.8, abs=0.05)
    (last,) = [point for point in found["curves"]["prune"] if point["step"] == 4]
    assert last["rows"] == 16
    assert not (Path(config.root) / "pruned").exists()
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    chosen = load_config(folder / "chosen.yaml")
    assert (chosen.root, chosen.router.num_codes, chosen.prune.run.cpus_per_worker) == (config.root, 2, 0.5)
    assert "outside of its trials" in capfd.readouterr().out

    expert = folder / found["name"] / "cut" / "00" / "code.json"
    expert.unlink()
    teacher = (folder / "teacher.json").stat().st_mtime_ns
    again = tune(replace(config, tune=replace(config.tune, choose=found["name"])))
    assert again["finished"] == again["failed"] == 1
    assert not expert.exists(), "finished: not run again"
    assert (folder / "teacher.json").stat().st_mtime_ns == teacher, "measured once"
    assert "named by tune.choose" in (folder / "chosen.yaml").read_text().splitlines()[0]
    records = {path.parent.name: json.loads(path.read_text())["trial"] for path in folder.glob("*/trial.json")}
    assert records[failed["name"]]["started"] > failed["ended"], "failed: run again"
