"""The method against opponents that cost the same and train as long: each a run of its own, per budget and seed.

    <root>/runs/budget-0.35/seed-0/routed/               the config as it is; at the root's own budget and seed its run
                                   one_code/             one learned code, trained as long as all experts together
                                   one_code_short/       one learned code, trained as long as one expert
                                   similarity_routing/   prompts go by similarity of gates, in equal shares

All runs read the root's own encoded rows. The total is `share.run.steps` and, for each of `router.num_codes` codes,
`finetune.run.steps`; a learning rate that falls does so over all of a run's steps. `random_routing` and `oracle` use
the method's experts; `experiment.baselines` are cut and trained in the run of `one_code`, as long as its network. What
is finished is reused, and what was interrupted goes on, as in any run. `<root>/comparison/` says how they compare.
"""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef

from aptp_platform.config import ConfigError, ExperimentConfig, ReuseConfig, RunConfig
from aptp_platform.config_file import with_absolute_places
from aptp_platform.experts.cut import BASELINES
from aptp_platform.experts.evidence.scores import load_scores
from aptp_platform.experts.evidence.trials import ArmRun
from aptp_platform.experts.experiment.comparison import compare
from aptp_platform.experts.experiment.comparison_report import write
from aptp_platform.experts.experiment.curves import mean_curve, run_curve
from aptp_platform.run.facts import Facts
from aptp_platform.run.layout import COMPARISON, EVALUATED, home
from aptp_platform.run.path import run_stage
from aptp_platform.run.progress import Progress
from aptp_platform.run.stages import STAGES, readers_of
from aptp_platform.storage.store import Store

METHOD = "routed"
ONE, SHORT, SIMILARITY = "one_code", "one_code_short", "similarity_routing"
OPPONENTS = (ONE, SHORT, SIMILARITY)
STAGES_OF_A_RUN = tuple(name for name in STAGES if name not in ("encode", "publish"))


Run = tuple[float, int, str, RunConfig]  # budget, seed, arm and config


def experiment(config: RunConfig, restart: Collection[str] = ()) -> dict[str, Any]:
    """Train and evaluate all runs, publish `comparison/` (metrics.json, report.html, figures); returns the metrics.

    Args:
        restart: stages that are started anew, with those that read them, in those runs in which they were made from
            something else.

    Raises:
        ConfigError: the experiment cannot be made.
        ValueError: the runs that were made do not compare; the line says which arm, and why.
    """
    config = with_absolute_places(config)
    runs = train_runs(config, restart)
    root = Store.open(config.root, config.storage)
    with tempfile.TemporaryDirectory() as scratch:
        arms = [ArmRun(arm, _scores(run, Path(scratch))) for _, _, arm, run in runs]
        found, folder = compare(arms, tolerance=config.experiment.tolerance), Path(scratch) / COMPARISON
        folder.mkdir()
        write(folder, found, arms, curves=_curves(runs))
        root.publish(folder, COMPARISON, last=("metrics.json",))
    print(f"[experiment] {root.join(COMPARISON).uri}/report.html compares {len(runs)} runs", flush=True)
    return found


def _scores(run: RunConfig, scratch: Path) -> Any:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return load_scores(home(run, "evaluate").fetch(EVALUATED, folder))


def _curves(runs: Sequence[Run]) -> dict[str, list[dict[str, float]]] | None:
    """Of the first budget: each arm's held-out extra loss along its training, the mean over seeds; None if no training
    was measured."""
    first = runs[0][0]
    by_arm: dict[str, list[list[dict[str, float]]]] = {}
    for budget, _, arm, run in runs:
        if budget == first and (curve := run_curve(run)):
            by_arm.setdefault(arm, []).append(curve)
    return {arm: mean_curve(curves) for arm, curves in by_arm.items()} or None


def total_steps(config: RunConfig) -> int:
    """The training that an arm has, in steps of one network: stage 1 is not counted, which all arms have alike."""
    return config.share.run.steps + config.router.num_codes * config.finetune.run.steps


def check_experiment(config: RunConfig) -> None:
    """ConfigError for opponents that there are not, or a comparison that would not be at equal training."""
    chosen = config.experiment
    if unknown := [name for name in chosen.opponents if name not in OPPONENTS]:
        raise ConfigError(f"experiment.opponents: {unknown[0]!r}: must be one of {', '.join(OPPONENTS)}")
    if unknown := [name for name in chosen.baselines if name not in BASELINES]:
        raise ConfigError(f"experiment.baselines: {unknown[0]!r}: must be one of {', '.join(BASELINES)}")
    if chosen.baselines and ONE not in chosen.opponents:
        raise ConfigError(
            f"experiment.baselines: {chosen.baselines[0]!r}: train in the run of {ONE}; add it to opponents"
        )
    if not chosen.seeds:
        raise ConfigError("experiment.seeds: []: name at least one seed")
    if config.share.run.batch_size != config.finetune.run.batch_size and config.share.run.steps:
        raise ConfigError(
            f"finetune.run.batch_size: {config.finetune.run.batch_size}: must be share.run.batch_size, "
            f"{config.share.run.batch_size}: a step of every training counts alike"
        )


def runs_of(config: RunConfig) -> Iterator[Run]:
    """Budget, seed, arm and config of every run, those that others start from first."""
    arms = (METHOD, *(name for name in OPPONENTS if name in config.experiment.opponents))
    for budget, seed, arm in product(config.experiment.budgets, config.experiment.seeds, arms):
        yield budget, seed, arm, run_of(config, budget, seed, arm)


def run_of(config: RunConfig, budget: float, seed: int, arm: str) -> RunConfig:
    """The config of one run."""
    folder = f"{config.root.rstrip('/')}/runs/budget-{budget:g}/seed-{seed}"
    own = replace(
        config,
        root=f"{folder}/{arm}",
        seed=seed,
        reuse=ReuseConfig(encode=home(config, "encode").uri),
        router=replace(config.router, budget=budget),
        cut=replace(config.cut, baselines=()),
        finetune=replace(config.finetune, steps_of="mean"),  # so that totals do not depend on which codes are kept
        experiment=ExperimentConfig(),
    )
    if arm == METHOD and (own.cut, own.finetune, budget, seed) == (
        config.cut, config.finetune, config.router.budget, config.seed
    ):  # fmt: skip
        return replace(own, root=config.root)  # what the root has finished is not trained again
    if arm == SIMILARITY:
        objective = replace(own.prune.objective, warmup="prompts", size_span=0.0, resource="log", balance=inf)
        router = replace(own.router, routing="similarity")
        return replace(own, router=router, prune=replace(own.prune, objective=objective))
    if arm in (ONE, SHORT):
        steps = total_steps(config)
        if arm == SHORT:
            steps = max(1, round(steps / config.router.num_codes))
            own = replace(
                own, reuse=replace(own.reuse, **dict.fromkeys(("prune", "share", "assign"), f"{folder}/{ONE}"))
            )
        else:
            own = replace(own, cut=replace(own.cut, baselines=config.experiment.baselines))
        first = config.share.run if config.share.run.steps else config.finetune.run
        run = replace(
            config.finetune.run, steps=steps, learning_rate=first.learning_rate, warmup_steps=first.warmup_steps
        )
        return replace(
            own,
            router=replace(own.router, num_codes=1),
            share=replace(own.share, run=replace(own.share.run, steps=0)),
            finetune=replace(own.finetune, run=run),
        )
    return own


def train_runs(config: RunConfig, restart: Collection[str] = ()) -> list[Run]:
    """Take every run of the experiment to the end of its evaluation, `experiment.at_once` at a time.

    Raises:
        ConfigError: the experiment cannot be made.
        RayTaskError: of the first run that failed, when all others are done.
    """
    check_experiment(config)
    run_stage("encode", config, restart="changed" if "encode" in restart else "no")
    runs = list(runs_of(config))
    made: dict[str, ObjectRef[None]] = {}
    with Progress("experiment", len(runs)) as progress:
        for number, (_, _, _, run) in enumerate(runs):
            if number >= config.experiment.at_once:
                _, working = ray.wait(list(made.values()), num_returns=number - config.experiment.at_once + 1)
                progress.update(len(made) - len(working))
            before = made.get(run.reuse.prune) if run.reuse.prune else None
            made[run.root] = _train.remote(run, before, readers_of(restart) | set(restart))
        ray.wait(list(made.values()), num_returns=len(made))
        progress.update(len(runs))
    ray.get(list(made.values()))
    return runs


# A process of its own: stages count a network's MACs and build it on meta devices, which is no matter for threads. It
# only waits for its stages' tasks and workers, so it takes no CPU from them.
@ray.remote(num_cpus=0, max_retries=0)
def _train(run: RunConfig, before: None, restart: frozenset[str]) -> None:
    """Ray starts it when the run that it starts from is done."""
    known = Facts(run)
    for stage in STAGES_OF_A_RUN:
        run_stage(stage, run, restart="changed" if stage in restart else "no", known=known)
