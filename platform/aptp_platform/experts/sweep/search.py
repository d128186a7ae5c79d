"""Optuna proposes a sweep's trials to Ray Tune, and trials that fall behind are stopped.

Ray's own OptunaSearch does not fit (2.60): it tells a multi-objective study that a stopped trial is complete with
whatever it reported last, a pruning's early cost included; `add_evaluated_point` takes one objective only, so a sweep
that is started again could not tell it what it knows; and it proposes points of a small space again and again. Optuna's
own pruners refuse several objectives (`Trial.report`). Hence ask and tell here, and a rule of our own for stopping.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from aptp_platform.experts.sweep.record import Trial
from aptp_platform.experts.sweep.space import BUDGET, Settings, Space, Values, points, trial_name

RANDOM_SHARE: Final = 3  # one trial in so many is drawn at random before Optuna models what was found
TRIES: Final = 100  # to propose a point that no trial has had


class Proposals(Searcher):
    """Tune's search algorithm: the settings of each next trial. They minimise held-out extra loss and cost.

    Args:
        known: what earlier starts have found. again: points to run before any other.
        result: of a trial that has ended, by name; None if it left no record.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        trials: int,
        known: Sequence[Trial],
        again: Sequence[Settings],
        result: Callable[[str], Trial | None],
    ) -> None:
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._result = space, result
        self._sides = {field: _distribution(side) for field, side in space.items()}
        # A start that goes on must not draw again what the seed drew before it.
        sampler = optuna.samplers.TPESampler(
            seed=seed + len(known), n_startup_trials=max(2, math.ceil(trials / RANDOM_SHARE))
        )
        self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        self._proposed = {trial_name(trial.settings) for trial in known}
        for trial in known:
            values = _objectives(trial)
            if values is not None:
                params = self._params(trial.settings)
                self._study.add_trial(
                    optuna.trial.create_trial(values=values, params=params, distributions=self._sides)
                )
        self._again = list(again)
        self._running: dict[str, tuple[optuna.trial.Trial, str]] = {}

    def suggest(self, trial_id: str) -> Any:
        """The settings of one more trial, never those of another; FINISHED when there are none left."""
        trial, settings = self._again_or_new()
        if trial is None:
            return self.FINISHED
        name = trial_name(settings)
        self._proposed.add(name)
        self._running[trial_id] = trial, name
        return {"settings": settings}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study what the trial's record says; a trial without a result tells it nothing."""
        if trial_id not in self._running:
            return
        trial, name = self._running.pop(trial_id)
        found = self._result(name)
        values = None if found is None else _objectives(found)
        self._study.tell(trial, values, state=TrialState.FAIL if values is None else TrialState.COMPLETE)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its trials' records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def _again_or_new(self) -> tuple[optuna.trial.Trial | None, Settings]:
        if self._again:
            settings = self._again.pop(0)
            self._study.enqueue_trial(self._params(settings))
            return self._study.ask(self._sides), settings
        for _ in range(TRIES):
            trial = self._study.ask(self._sides)
            settings = self._settings(trial.params)
            if trial_name(settings) not in self._proposed:
                return trial, settings
            self._study.tell(trial, state=TrialState.FAIL)  # drawn before: ask for another
        every = points(self._space)
        left = [point for point in every or [] if trial_name(point) not in self._proposed]
        if not left:
            return None, {}
        self._study.enqueue_trial(self._params(left[0]))
        return self._study.ask(self._sides), left[0]

    def _params(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's names of a point: a value is known by its place in the list, so it may be of any type."""
        return {
            field: side.values.index(settings[field]) if isinstance(side, Values) else settings[field]
            for field, side in self._space.items()
        }

    def _settings(self, params: Mapping[str, Any]) -> Settings:
        return {
            field: side.values[params[field]] if isinstance(side, Values) else params[field]
            for field, side in self._space.items()
        }


class Stopping(FIFOScheduler):
    """Tune's scheduler: trials run in the order in which they are proposed, and `behind` says which ones are stopped.

    Tune ends a stopped trial's process. What its worker group had reserved comes back through Ray Train's cleaner. That
    asks the dashboard, which jobs have; without one it stays reserved.

    Args:
        behind: from a trial's settings and what it reports, whether it is stopped.
    """

    def __init__(self, behind: Callable[[Settings, Mapping[str, Any]], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._behind = behind

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return TrialScheduler.STOP if self._behind(trial.config["settings"], result) else TrialScheduler.CONTINUE


def _distribution(side: Any) -> BaseDistribution:
    if isinstance(side, Values):
        return CategoricalDistribution(range(len(side.values)))
    if side.whole:
        return IntDistribution(int(side.low), int(side.high), log=side.log)
    return FloatDistribution(side.low, side.high, log=side.log)


def _objectives(trial: Trial) -> list[float] | None:
    """What a trial tells the study. A stopped one had not met its budget yet, so that stands for its cost."""
    if trial.state == "finished":
        return [trial.extra_loss, trial.cost_ratio]
    return [trial.extra_loss, trial.settings[BUDGET]] if trial.state == "stopped" else None
