"""A sweep by Ray Tune and Optuna: each trial prunes, shares, assigns, cuts and scores in its own folder.

Encoded rows and the teacher's losses on them are made once and shared. A trial's score is what its experts lose more
than the full model on held-out rows, as its own router assigns them, and their cost there. While a trial trains, its
held-out curve says whether it falls behind the others of its budget; it is stopped then (`sweep/choice.py`).
"""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.logger import JsonLoggerCallback

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import to_tree, with_absolute_places, with_fields
from aptp_platform.experts.assign import assign
from aptp_platform.experts.cut import cut
from aptp_platform.experts.score import Scorer, check_scoring
from aptp_platform.experts.sweep.choice import falls_behind
from aptp_platform.experts.sweep.outcome import report
from aptp_platform.experts.sweep.record import (
    Trial,
    facts_of,
    read_curves,
    read_trial,
    read_trials,
    seconds_inside,
    write_trial,
)
from aptp_platform.experts.sweep.search import Proposals, Stopping
from aptp_platform.experts.sweep.space import BUDGET, Settings, read_space, trial_name
from aptp_platform.run.facts import Facts
from aptp_platform.run.job import cause_of
from aptp_platform.run.layout import HELD_OUT_ROWS, TRAIN_ROWS, TRIALS, home
from aptp_platform.run.record import put_aside
from aptp_platform.storage.lease import Lease
from aptp_platform.storage.store import Store
from aptp_platform.train.curve import Point
from aptp_platform.train.loop import CURVE
from aptp_platform.train.trainer import check_group, check_reach, prune, share

# A trial only waits for its worker group, and what it reserves itself is lost to that group (0 is refused).
TRIAL_RESOURCES = {"CPU": 0.01}
TEACHER = "teacher.json"


def tune(config: RunConfig) -> dict[str, Any]:
    """Run the sweep of `config.tune`, or go on with it; leaves results, a figure and the chosen config in `tune/`.

    Raises:
        ConfigError: the space cannot be searched, or no trial has finished.
        LeaseError: another process runs this sweep.
    """
    began = time.time()
    root = Store.open(config.root, config.storage)
    encoded = home(config, "encode")
    encoded.join(TRAIN_ROWS).require("*.parquet", "root, or run the encode job first")
    encoded.join(HELD_OUT_ROWS).require("*.parquet", "data.heldout, or run the encode job first")
    check_group(config.prune.run, "prune.run", config.encode)
    if config.share.run.steps:
        check_group(config.share.run, "share.run", config.encode)
    check_scoring(config.evaluate)
    sweep = Sweep(with_absolute_places(config))
    with Lease(root, TRIALS):
        sweep.run()
        trials = sweep.trials()
    wall = time.time() - began
    own = wall - seconds_inside([trial for trial in trials if trial.started >= began])
    print(f"the sweep took {wall:.0f} s, of which {own:.0f} s ({own / wall:.0%}) outside of its trials", flush=True)
    return report(root.join(TRIALS), config, trials, {"wall": round(wall, 1), "outside of trials": round(own, 1)})


class Sweep:
    """The sweep of one config: what is known of its trials, and what runs the others."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.space = config, read_space(config)
        self.root = Store.open(config.root, config.storage)
        self.folder = self.root.join(TRIALS)
        self.encoded = Facts(config).inputs()
        self._curves: dict[str, Trial] = {}  # by name: what each has reported
        if not any(field.startswith("space.") for field in self.space):  # else a trial says what it cannot reach
            most, least = max(config.tune.num_codes), min(config.tune.budgets)
            check_reach(config, most, least, ("tune.num_codes", "tune.budgets"))

    def trials(self) -> list[Trial]:
        return read_trials(self.folder, self.config, self.space, self.encoded)

    def run(self) -> None:
        """The trials that are left."""
        known = self.trials()
        done = [trial for trial in known if trial.state in ("finished", "stopped")]
        again = [trial.settings for trial in known if trial not in done]
        again.sort(key=lambda settings: trial_name(settings))
        left = self.config.tune.trials - len(done)
        print(f"[tune] {len(done)} trials are known from an earlier start, {max(left, 0)} are left", flush=True)
        if left <= 0:
            return
        teacher = self._teacher()
        self._curves |= {trial.name: trial for trial in done}
        search = Proposals(self.space, self.config.seed, self.config.tune.trials, done, again, self._record)
        trainable = ray_tune.with_resources(
            ray_tune.with_parameters(_trial, config=self.config, encoded=self.encoded, teacher=teacher), TRIAL_RESOURCES
        )
        # Tune reads its JSON log itself; those for TensorBoard and CSV would warn at every curve.
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        with TemporaryDirectory() as scratch:
            grid = ray_tune.Tuner(
                trainable,
                tune_config=ray_tune.TuneConfig(
                    search_alg=search,
                    scheduler=Stopping(self._behind),
                    num_samples=left,
                    max_concurrent_trials=self.config.tune.concurrent,
                ),
                run_config=ray_tune.RunConfig(
                    name="tune", storage_path=scratch, verbose=0, callbacks=[JsonLoggerCallback()]
                ),
            ).fit()
        for result in (grid[index] for index in range(len(grid))):
            settings = (result.config or {})["settings"]
            if result.error is not None:
                self._died(settings, result.error)
            elif (trial := self._record(trial_name(settings))) is None or trial.state == "running":
                raise KeyboardInterrupt  # Tune itself ends quietly at ^C; the next start goes on

    def _teacher(self) -> dict[str, float]:
        """The full model's losses on the rows that score trials, measured once."""
        config = self.config
        facts = {
            "encoded": self.encoded,
            "model": to_tree(config.model),
            "seed": config.seed,
            "rows": config.tune.rows,
            "timesteps": list(config.evaluate.timesteps),
        }
        if self.folder.exists(TEACHER) and (before := self.folder.read_json(TEACHER))["facts"] == facts:
            return before["losses"]
        losses = Scorer(config, config.tune.rows).teacher()
        self.folder.write_json(TEACHER, {"facts": facts, "losses": losses})
        return losses

    def _record(self, name: str) -> Trial | None:
        return next((trial for trial in self.trials() if trial.name == name), None)

    def _behind(self, settings: Settings, result: Mapping[str, Any]) -> bool:
        """Whether a trial that has just reported a checkpoint falls behind; its record says so then."""
        if CURVE not in result:
            return False
        training, step, name = result["training"], result["step"], trial_name(settings)
        before = self._curves.get(name) or Trial(settings, "running")
        self._curves[name] = replace(before, curves={**before.curves, training: result[CURVE]})
        steps = getattr(with_fields(self.config, settings), training).run.steps
        if not self.config.tune.stop_from * steps <= step < steps:
            return False
        (own,) = self._points({name}, training, step, settings)
        others = self._points(self._curves.keys() - {name}, training, step, settings)
        if not falls_behind(own, others):
            return False
        folder, facts = self.folder.join(name), facts_of(self.config, settings, self.encoded)
        started = read_trial(folder, facts)
        reason = f"at step {step} of {steps} of {training} most others of its budget lost less at no higher cost"
        stopped = replace(
            started or before, state="stopped", extra_loss=own.extra_loss, cost_ratio=own.cost_ratio,
            curves=self._curves[name].curves, reason=reason, ended=time.time(),
        )  # fmt: skip
        write_trial(folder, stopped, facts)
        return True

    def _points(self, names: set[str], training: str, step: int, like: Settings) -> list[Point]:
        """What those of these trials that have the same budget lost at this step."""
        return [
            Point(**point)
            for name in sorted(names)
            if self._curves[name].settings[BUDGET] == like[BUDGET]
            for point in self._curves[name].curves.get(training, [])
            if point["step"] == step
        ]

    def _died(self, settings: Settings, error: Exception) -> None:
        """Record a trial whose process has ended without a word."""
        folder, facts = self.folder.join(trial_name(settings)), facts_of(self.config, settings, self.encoded)
        trial = read_trial(folder, facts) or Trial(settings, "running", started=time.time())
        if trial.state == "running":
            reason = f"its process has ended: {_one_line(error)}"
            write_trial(folder, replace(trial, state="failed", reason=reason, ended=time.time()), facts)


def _trial(settings: dict[str, Any], config: RunConfig, encoded: str, teacher: dict[str, float]) -> dict[str, Any]:
    """One trial, in a process of Ray Tune; whatever goes wrong in it is written into its record."""
    point: Settings = settings["settings"]
    shared = Store.open(config.root, config.storage)
    folder, facts = shared.join(TRIALS, trial_name(point)), facts_of(config, point, encoded)
    if folder.exists() and read_trial(folder, facts) is None:
        put_aside(shared, f"{TRIALS}/{trial_name(point)}")  # of another config
    trial = Trial(point, "running", started=time.time())
    write_trial(folder, trial, facts)
    try:
        trial = _run(trial, _own(config, point, folder), teacher)
    except Exception as error:
        trial = replace(trial, state="failed", reason=_one_line(error))
    now = read_trial(folder, facts)
    if now is None or now.state != "stopped":  # stopping ends this process, which must not look like a failure
        write_trial(folder, replace(trial, curves=read_curves(folder), ended=time.time()), facts)
    return {"state": trial.state}


def _run(trial: Trial, own: RunConfig, teacher: dict[str, float]) -> Trial:
    # Each training has a callback of its own: Ray Train takes it to another process.
    prune(own, teacher, [TuneReportCallback()])
    share(own, teacher, [TuneReportCallback()])
    usage = assign(own)["shares"]
    ratios = cut(own)["MACs ratios"]
    found = Scorer(own, own.tune.rows).experts(teacher, ratios)
    return replace(trial, state="finished", extra_loss=found.extra_loss, cost_ratio=found.cost_ratio, usage=usage)


def _own(config: RunConfig, settings: Settings, folder: Store) -> RunConfig:
    """The config of one trial: its trainings are measured on the rows that score it, and it cuts no baselines."""
    own = with_fields(config, settings)
    rows = own.tune.rows
    return replace(
        own,
        root=folder.uri,
        prune=replace(own.prune, run=replace(own.prune.run, heldout_rows=rows)),
        share=replace(own.share, run=replace(own.share.run, heldout_rows=rows)),
        cut=replace(own.cut, baselines=()),
        reuse=replace(own.reuse, encode=home(config, "encode").uri),
    )


def _one_line(error: BaseException) -> str:
    line = cause_of(error)
    return line if isinstance(error, ConfigError) or len(line) <= 300 else f"{line[:300]} ..."
