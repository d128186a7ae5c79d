"""A sweep over (number of codes, budget) by Ray Tune: each trial prunes, assigns, cuts and scores in its own folder.

The encoded rows are made once and shared. A trial's score is the loss of its experts on held-out prompts, as its own
router assigns them (`score.py`).
"""

import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
from ray import tune as ray_tune
from rich.console import Console
from rich.table import Table

from aptp.expert import load_expert
from aptp_platform.config import RunConfig
from aptp_platform.config_file import to_tree
from aptp_platform.data.heldout import read_held_out, row_losses
from aptp_platform.experts.assign import assign
from aptp_platform.experts.cut import cut
from aptp_platform.experts.score import check_scoring
from aptp_platform.models import load_pipeline_parts
from aptp_platform.run.layout import CUT, HELD_OUT_ROWS, TRAIN_ROWS, TRIALS, assigned_router, network_of
from aptp_platform.storage.store import Store
from aptp_platform.train.trainer import check_group, prune, share

SCORED_ROWS = 128
# A trial only waits for its worker group, and what it reserves itself is lost to that group (0 is refused).
TRIAL_RESOURCES = {"CPU": 0.01}


@dataclass(frozen=True)
class Trial:
    """What one trial found. loss: mean held-out denoising loss; extra_loss: above the full model's; ratio: MACs."""

    num_codes: int
    budget: float
    folder: str
    ratio: float
    loss: float
    extra_loss: float
    usage: list[float]
    seconds: float


def tune(config: RunConfig) -> dict[str, Any]:
    """Run the sweep of `config.tune`, print its table, write `tune/results.json`.

    A trial that finished under the same config is not run again; an interrupted one continues.
    """
    root = Store.open(config.root, config.storage)
    root.join(TRAIN_ROWS).require("*.parquet", "root, or run the encode job first")
    root.join(HELD_OUT_ROWS).require("*.parquet", "data.heldout, or run the encode job first")
    check_group(config.prune.run, "prune.run", config.encode)
    check_scoring(config.evaluate)
    pairs = list(product(config.tune.num_codes, config.tune.budgets))
    chosen = np.random.default_rng(config.seed).permutation(len(pairs))[: config.tune.trials]
    trainable = ray_tune.with_resources(ray_tune.with_parameters(_trial, config=config), TRIAL_RESOURCES)
    with TemporaryDirectory() as scratch:
        grid = ray_tune.Tuner(
            trainable,
            param_space={"shape": ray_tune.grid_search([pairs[index] for index in sorted(chosen)])},
            tune_config=ray_tune.TuneConfig(max_concurrent_trials=config.tune.concurrent),
            run_config=ray_tune.RunConfig(name="tune", storage_path=scratch, verbose=0),
        ).fit()
    if grid.errors:
        raise grid.errors[0]
    found: list[Any] = [grid[index].metrics for index in range(len(grid))]
    trials = [Trial(**metrics["trial"]) for metrics in found]
    pareto = pareto_set([(trial.ratio, trial.loss) for trial in trials])
    _print(trials, pareto)
    rows = [{**asdict(trial), "pareto": index in pareto} for index, trial in enumerate(trials)]
    root.join(TRIALS).write_json("results.json", {"config": to_tree(config), "trials": rows})
    return {"trials": len(trials), "pareto": [rows[index]["folder"] for index in pareto]}


def pareto_set(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in one coordinate without losing in the other; less is better."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [index for index, point in enumerate(points) if not any(beats(other, point) for other in points)]


def _trial(settings: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    num_codes, budget = settings["shape"]
    started = time.monotonic()
    shared = Store.open(config.root, config.storage)
    name = f"codes-{num_codes}-budget-{budget:g}"
    folder = shared.join(TRIALS, name)
    own = replace(
        config,
        root=folder.uri,
        router=replace(config.router, num_codes=num_codes, budget=budget),
        cut=replace(config.cut, baselines=()),
    )
    facts = {"config": to_tree(own)}
    if folder.exists("trial.json") and (before := folder.read_json("trial.json"))["config"] == facts["config"]:
        return {"trial": before["trial"]}
    encoded = shared.join(TRAIN_ROWS)
    prune(own, encoded)
    share(own, encoded)
    shares = assign(own, encoded)["shares"]
    ratios = cut(own, encoded)["MACs ratios"]
    score = _score.options(num_gpus=own.evaluate.gpus_per_network)
    loss, full, ratio = ray.get(score.remote(own, shared, ratios))
    seconds = round(time.monotonic() - started, 1)
    trial = Trial(num_codes, budget, folder.uri, ratio, loss, loss - full, shares, seconds)
    folder.write_json("trial.json", {**facts, "trial": asdict(trial)})
    return {"trial": asdict(trial)}


# DEFAULT: in a trial of Ray Tune a task would otherwise have to fit into the trial's own resources, next to none.
@ray.remote(num_cpus=0.5, scheduling_strategy="DEFAULT")
def _score(config: RunConfig, shared: Store, ratios: dict[str, float]) -> tuple[float, float, float]:
    """Mean held-out loss of the experts, of the full model on the same rows and noise, and the experts' MACs ratio."""
    parts = load_pipeline_parts(config.model, config.storage)
    held = read_held_out(config, shared.join(HELD_OUT_ROWS), SCORED_ROWS)
    own = Store.open(config.root, config.storage)
    names = [network_of(code) for code in assigned_router(own).route_embeddings(held.embeddings).indices.tolist()]
    device = "cuda" if config.evaluate.gpus_per_network else "cpu"
    ours = []
    with TemporaryDirectory() as scratch:
        for name in sorted(set(names)):
            expert = load_expert(own.join(CUT).fetch(name, scratch)).float().to(device)
            mine = [row for row in range(len(names)) if names[row] == name]
            ours.append(row_losses(config.evaluate, parts, expert, held, mine))
    full = row_losses(config.evaluate, parts, parts.unet.to(device), held, list(range(len(names))))
    return float(np.concatenate(ours).mean()), float(full.mean()), float(np.mean([ratios[name] for name in names]))


def _print(trials: list[Trial], pareto: list[int]) -> None:
    table = Table("codes", "budget", "MACs as routed", "held-out loss", "above the full model", "seconds", "Pareto")
    for index, trial in enumerate(trials):
        table.add_row(
            str(trial.num_codes), f"{trial.budget:g}", f"{trial.ratio:.3f}", f"{trial.loss:.4f}",
            f"{trial.extra_loss:+.4f}", f"{trial.seconds:.0f}", "yes" if index in pareto else "",
        )  # fmt: skip
    Console(width=120).print(table)
