"""What is known of a sweep's trials: one file in each trial's folder, from which a sweep that is started again goes on.

A record counts as long as all that its trial's result depends on is what it was. A trial that has finished or was
stopped is not run again. One that failed is; one that was interrupted goes on from its checkpoints.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import to_tree, with_fields
from aptp_platform.experts.sweep.space import Settings, Space, holds, trial_name
from aptp_platform.run.layout import CURVES, PRUNED, SHARED
from aptp_platform.storage.store import Store
from aptp_platform.train.specs import common_of, result_of

RECORD: Final = "trial.json"
CURVE_FILES: Final = {"prune": f"{PRUNED}/{CURVES}/prune.json", "share": f"{SHARED}/{CURVES}/share.json"}


@dataclass(frozen=True)
class Trial:
    """One point of the space and what became of it.

    extra_loss, cost_ratio: of a finished trial, its experts as cut and as routed; of a stopped one, at its last point.
    curves: for each training its points (`aptp_platform.train.curve.Point`). started, ended: seconds since the epoch.
    """

    settings: Settings
    state: Literal["running", "finished", "stopped", "failed"]
    extra_loss: float = float("inf")
    cost_ratio: float = float("inf")
    usage: list[float] = field(default_factory=list)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    reason: str = ""  # why it failed or was stopped
    started: float = 0.0
    ended: float = 0.0

    @property
    def name(self) -> str:
        return trial_name(self.settings)

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def facts_of(config: RunConfig, settings: Settings, encoded: str) -> dict[str, Any]:
    """What a trial's result depends on, as plain data. encoded: the fingerprint of the encoded rows."""
    own = with_fields(config, settings)
    trainings = {
        name: {"objective": to_tree(section.objective), "steps": section.run.steps, "run": result_of(section.run)}
        for name, section in (("prune", own.prune), ("share", own.share))
    }
    scored = {"rows": own.tune.rows, "timesteps": list(own.evaluate.timesteps)}
    return {**common_of(own), **trainings, "assign": to_tree(own.assign), "encoded": encoded, "scored": scored}


def write_trial(folder: Store, trial: Trial, facts: dict[str, Any]) -> None:
    """Into the trial's own folder. Infinity is no JSON, so what was not measured is left out."""
    tree = {name: value for name, value in asdict(trial).items() if value != float("inf")}
    folder.write_json(RECORD, {"facts": facts, "trial": tree})


def read_trial(folder: Store, facts: dict[str, Any]) -> Trial | None:
    """The record in a trial's folder; None if there is none of a trial with these facts."""
    if not folder.exists(RECORD):
        return None
    record = folder.read_json(RECORD)
    return Trial(**record["trial"]) if record["facts"] == facts else None


def read_trials(folder: Store, config: RunConfig, space: Space, encoded: str) -> list[Trial]:
    """What is known of this config's trials, by name. folder: that of the sweep."""
    trials = []
    for name in folder.list(f"*/{RECORD}"):
        record = folder.read_json(name)
        settings = record["trial"]["settings"]
        try:
            known = holds(space, settings) and record["facts"] == facts_of(config, settings, encoded)
        except ConfigError:
            continue  # a value that this config no longer allows
        if known:
            trials.append(Trial(**record["trial"]))
    return trials


def read_curves(folder: Store) -> dict[str, list[dict[str, Any]]]:
    """The curves of a trial's trainings, as far as they have come."""
    return {name: folder.read_json(file) for name, file in CURVE_FILES.items() if folder.exists(file)}


def seconds_inside(trials: Sequence[Trial]) -> float:
    """How long at least one of these trials ran."""
    total, until = 0.0, 0.0
    for trial in sorted(trials, key=lambda trial: trial.started):
        total += max(0.0, trial.ended - max(trial.started, until))
        until = max(until, trial.ended)
    return total
