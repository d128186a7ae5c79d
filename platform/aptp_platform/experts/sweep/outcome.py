"""What a sweep leaves: a table, `results.json`, `pareto.png`, and `chosen.yaml`, a config that is ready to run."""

import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import dump_config, to_tree, with_fields
from aptp_platform.experts.sweep.choice import choose, pareto_set
from aptp_platform.experts.sweep.record import Trial
from aptp_platform.storage.store import Store

RESULTS: Final = "results.json"
FIGURE: Final = "pareto.png"
CHOSEN: Final = "chosen.yaml"


def report(folder: Store, config: RunConfig, trials: Sequence[Trial], seconds: dict[str, float]) -> dict[str, Any]:
    """Print and write what was found; returns the summary.

    Args:
        folder: that of the sweep. seconds: what the sweep took, for `results.json`.

    Raises:
        ConfigError: no trial has finished, or none of the name in `tune.choose`.
    """
    trials = sorted(trials, key=lambda trial: (trial.state != "finished", trial.cost_ratio, trial.name))
    finished = [trial for trial in trials if trial.state == "finished"]
    pareto = [finished[index].name for index in pareto_set(finished)]
    _print(trials, pareto)
    rows = [
        {"name": trial.name, "pareto": trial.name in pareto, "seconds": round(trial.seconds, 1)}
        | {name: value for name, value in asdict(trial).items() if value != float("inf")}
        for trial in trials
    ]
    tree = {"config": to_tree(config), "seconds": seconds, "trials": rows}
    if not finished:
        folder.write_json(RESULTS, tree)
        failed = next((trial for trial in trials if trial.state == "failed"), None)
        raise ConfigError(
            "tune: no trial has finished" + (f"; {failed.name} failed: {failed.reason}" if failed else "")
        )
    chosen, rule = _chosen(finished, config)
    folder.write_json(RESULTS, tree | {"chosen": chosen.name, "rule": rule})
    with folder.open_file(FIGURE, "wb") as stream:
        stream.write(draw(finished, pareto, chosen, config.router.budget))
    with folder.open_file(CHOSEN, "wb") as stream:
        stream.write(chosen_config(config, chosen, rule).encode())
    print(f"chosen: {chosen.name}: {rule}; its config is {folder.uri}/{CHOSEN}", flush=True)
    states = [trial.state for trial in trials]
    counts = {state: states.count(state) for state in ("finished", "stopped", "failed")}
    return {**counts, "pareto": pareto, "chosen": chosen.name, "extra loss": round(chosen.extra_loss, 5)}


def chosen_config(config: RunConfig, chosen: Trial, rule: str) -> str:
    """The whole config with a trial's settings, as YAML; its first line says how the trial was chosen."""
    own = with_fields(replace(config, tune=replace(config.tune, choose=None)), chosen.settings)
    return f"# Trial {chosen.name} of a sweep: {rule}.\n{dump_config(own)}"


def draw(finished: Sequence[Trial], pareto: Sequence[str], chosen: Trial, budget: float) -> bytes:
    """Held-out extra loss over cost, as a PNG."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    best = sorted((trial for trial in finished if trial.name in pareto), key=lambda trial: trial.cost_ratio)
    places = [[trial.cost_ratio for trial in best], [trial.extra_loss for trial in best]]
    axis.plot(*places, color="#2f6db5", drawstyle="steps-post", linewidth=1)
    for trial in finished:
        colour = "#2f6db5" if trial.name in pareto else "#888888"
        axis.scatter(trial.cost_ratio, trial.extra_loss, color=colour, marker="D" if trial is chosen else "o", zorder=2)
        place = (trial.cost_ratio, trial.extra_loss)
        axis.annotate(trial.name, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.axvline(budget, color="#888888", linestyle=":", label="router.budget")
    axis.set(xlabel="MACs as routed, share of the full model's", ylabel="held-out extra loss (lower is better)")
    axis.margins(x=0.2)
    axis.grid(alpha=0.3)
    axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _chosen(finished: Sequence[Trial], config: RunConfig) -> tuple[Trial, str]:
    wanted = config.tune.choose
    if wanted is None:
        index, rule = choose(finished, config.router.budget)
        return finished[index], rule
    for trial in finished:
        if trial.name == wanted:
            return trial, "named by tune.choose"
    names = ", ".join(trial.name for trial in finished)
    raise ConfigError(f"tune.choose: {wanted!r}: no finished trial has this name; they are {names}")


def _print(trials: Sequence[Trial], pareto: Sequence[str]) -> None:
    table = Table("trial", "state", "MACs as routed", "held-out extra loss", "seconds", "Pareto", "other settings")
    for trial in trials:
        others = [f"{field}={_short(value)}" for field, value in list(trial.settings.items())[2:]]
        cost, loss = ("" if value == float("inf") else value for value in (trial.cost_ratio, trial.extra_loss))
        table.add_row(
            trial.name, trial.state, f"{cost:.3f}" if cost else "", f"{loss:+.5f}" if loss != "" else "",
            f"{trial.seconds:.0f}", "yes" if trial.name in pareto else "", " ".join(others),
        )  # fmt: skip
    Console(width=160).print(table)
    for trial in trials:
        if trial.reason:
            print(f"[{trial.name}] {trial.state}: {trial.reason}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
