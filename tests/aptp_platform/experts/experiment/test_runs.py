"""The runs of an experiment: each arm's config, at equal cost and equal training."""

from dataclasses import replace
from typing import Any

import pytest

from aptp_platform.config import ConfigError, ExperimentConfig, RunConfig
from aptp_platform.config_file import load_config, parse_config, to_tree
from aptp_platform.experts.experiment.runs import OPPONENTS, check_experiment, runs_of, total_steps
from aptp_platform.run.facts import section_facts
from aptp_platform.run.stages import STAGES


@pytest.fixture
def config() -> RunConfig:
    chosen = ["experiment.budgets=[0.35, 0.5]", "experiment.seeds=[0, 1]", "experiment.baselines=[magnitude]"]
    chosen += [f"experiment.opponents=[{', '.join(OPPONENTS)}]"]
    more = ["share.run.steps=100", "share.run.batch_size=16", "share.run.learning_rate=0.001", "finetune.run.steps=50"]
    return load_config("jobs/configs/demo.yaml", [*chosen, *more])


def fields_of(stage: str, config: RunConfig) -> dict[str, Any]:
    """The fields of the config that a stage and those before it depend on."""
    own = {section: section_facts(config, section) for section in STAGES[stage].sections}
    return {k: v for earlier in STAGES[stage].after for k, v in fields_of(earlier, config).items()} | own


def test_every_arm_costs_and_trains_the_same(config: RunConfig) -> None:
    runs = list(runs_of(config))
    assert len(runs) == 2 * 2 * (1 + len(OPPONENTS))
    assert len({run.root for *_, run in runs}) == len(runs)
    assert total_steps(config) == 300
    for budget, seed, arm, run in runs:
        assert (run.router.budget, run.seed) == (budget, seed)
        assert total_steps(run) == (75 if arm == "one_code_short" else 300)
        assert run.finetune.steps_of == "mean"
        assert run.cut.baselines == (("magnitude",) if arm == "one_code" else ())
        assert parse_config(to_tree(run)) == run
    rates = {arm: run.finetune.run.learning_rate for *_, arm, run in runs}
    assert rates["routed"] == rates["similarity_routing"] == config.finetune.run.learning_rate
    assert rates["one_code"] == rates["one_code_short"] == 0.001, "the rate that a training starts at"


def test_what_arms_have_in_common_is_made_once(config: RunConfig) -> None:
    runs = {arm: run for budget, seed, arm, run in runs_of(config) if (budget, seed) == (0.5, 1)}
    assert {run.reuse.encode for run in runs.values()} == {runs["routed"].reuse.encode}
    assert runs["one_code_short"].reuse.assign == runs["one_code"].root
    for stage in ("prune", "share", "assign"):
        assert fields_of(stage, runs["one_code_short"]) == fields_of(stage, runs["one_code"])
    assert fields_of("prune", runs["one_code"]) != fields_of("prune", runs["routed"])
    assert fields_of("prune", runs["similarity_routing"]) != fields_of("prune", runs["routed"])


def test_the_roots_own_run_is_the_methods_at_its_budget_and_seed() -> None:
    demo = load_config("jobs/configs/demo.yaml", ["experiment.budgets=[0.5, 0.65]"])
    roots = {(budget, arm): run.root for budget, _, arm, run in runs_of(demo)}
    assert roots[0.65, "routed"] == demo.root
    assert roots[0.5, "routed"] == f"{demo.root}/runs/budget-0.5/seed-0/routed"
    (routed,) = (run for budget, _, arm, run in runs_of(demo) if (budget, arm) == (0.65, "routed"))
    assert all(fields_of(stage, routed) == fields_of(stage, demo) for stage in ("encode", "prune", "evaluate"))
    other = replace(demo, finetune=replace(demo.finetune, steps_of="each"))
    assert demo.root not in {run.root for *_, run in runs_of(other)}, "it trained another number of steps"


@pytest.mark.parametrize(
    ("experiment", "line"),
    [
        (
            {"opponents": ("one_cod",)},
            r"^experiment.opponents: 'one_cod': must be one of one_code, one_code_short, sim",
        ),
        ({"baselines": ("unifrom",)}, r"^experiment.baselines: 'unifrom': must be one of uniform, magnitude, random, "),
        ({"opponents": (), "baselines": ("random",)}, r"^experiment.baselines: 'random': train in the run of one_code"),
        ({"seeds": ()}, r"^experiment.seeds: \[\]: name at least one seed"),
    ],
)
def test_what_is_no_comparison_is_one_line(config: RunConfig, experiment: dict[str, Any], line: str) -> None:
    check_experiment(config)
    with pytest.raises(ConfigError, match=line):
        check_experiment(replace(config, experiment=ExperimentConfig(budgets=(0.5,), **experiment)))
    with pytest.raises(ConfigError, match=r"^finetune.run.batch_size: 8: must be share.run.batch_size, 16"):
        check_experiment(
            replace(config, finetune=replace(config.finetune, run=replace(config.finetune.run, batch_size=8)))
        )
