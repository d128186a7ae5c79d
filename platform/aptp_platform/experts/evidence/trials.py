"""Runs as arms: which belong together, and whether they may be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from aptp_platform.experts.evidence.arms import ORACLE, RANDOM, ROUTED, TEACHER, Arm
from aptp_platform.experts.evidence.scores import RunScores

SAME_TEACHER: Final = 0.01  # of its mean loss: what other devices and orders of summation may change


@dataclass(frozen=True)
class ArmRun:
    """A run as an arm of the comparison.

    Attributes:
        arm: what the run's router stands for: `routed` for the method, or the name of an opponent (`one_code`, ...).
            The run's baseline networks are arms under their own names; of the method, random routing and the oracle
            are too.
    """

    arm: str
    scores: RunScores


@dataclass(frozen=True)
class Trial:
    """All arms at one budget and one seed, on the same rows."""

    method: RunScores
    arms: dict[str, Arm]
    images: dict[str, Mapping[str, float | None]]
    steps: dict[str, int | None]
    pictures: dict[str, Sequence[bytes]]


def gather(runs: Sequence[ArmRun]) -> list[Trial]:
    """The runs by budget and seed, checked: whole, finite, and on the same rows.

    Raises:
        ValueError: one is missing, is there twice, or was scored on other rows; or a number is not finite.
    """
    by_place: dict[tuple[float, int], dict[str, RunScores]] = {}
    for run in runs:
        here = by_place.setdefault((run.scores.budget, run.scores.seed), {})
        if run.arm in here:
            raise ValueError(f"{_place(run)}: is there twice; give one run for each arm, budget and seed")
        here[run.arm] = run.scores
        _require_finite(run)
    if not by_place:
        raise ValueError("there is no run to compare: give the saved scores of at least one")
    _require_same_rows(runs)
    trials = [_trial(*place, here) for place, here in sorted(by_place.items(), key=lambda item: item[0])]
    for trial in trials:
        expected = next(other for other in trials if other.method.budget == trial.method.budget)
        if missing := set(expected.arms) ^ set(trial.arms):
            raise ValueError(
                f"{min(missing)}: is not there at every seed of budget {trial.method.budget:g} (seed "
                f"{expected.method.seed} differs from {trial.method.seed}); train it at all seeds, or leave it out"
            )
    return trials


def _trial(budget: float, seed: int, runs: Mapping[str, RunScores]) -> Trial:
    if ROUTED not in runs:
        raise ValueError(
            f"{ROUTED}: no run at budget {budget:g}, seed {seed}; every opponent needs the method beside it"
        )
    method = runs[ROUTED]
    trial = Trial(method, {}, {}, {}, {})
    for name in (TEACHER, ROUTED, RANDOM, ORACLE):
        drawn = name if name in (TEACHER, ROUTED) else ""  # random routing and the oracle draw nothing of their own
        _add(trial, name, method, method.arms()[name], drawn, None if name == TEACHER else method.steps)
    for name, scores in runs.items():
        if scores is not method:
            _add(trial, name, scores, scores.routed(), ROUTED, scores.steps)
    for scores in runs.values():
        for name, network in scores.singles.items():
            _add(trial, name, scores, scores.arms()[name], name, network.steps)
    return trial


def _add(trial: Trial, name: str, scores: RunScores, arm: Arm, drawn: str, steps: int | None) -> None:
    """drawn: under which name the run keeps this arm's images."""
    if name in trial.arms:
        raise ValueError(
            f"{name}: is an arm of two runs at budget {scores.budget:g}, seed {scores.seed}; "
            "leave it out of cut.baselines of one of them"
        )
    trial.arms[name] = arm
    trial.steps[name] = steps
    trial.images[name] = scores.image_scores.get(drawn, {})
    trial.pictures[name] = scores.pictures.get(drawn, ())


def _require_finite(run: ArmRun) -> None:
    scores = run.scores
    arrays = {"embeddings": scores.embeddings, "predicted losses": scores.predicted, "real images": scores.real}
    for name, network in scores.networks.items():
        arrays |= {f"losses of network {name}": network.losses, f"distances of network {name}": network.distances}
        arrays[f"milliseconds of network {name}"] = np.array([network.milliseconds])
    arrays |= {f"features of {name}": rows for name, rows in scores.features.items()}
    for what, values in arrays.items():
        if values is not None and (bad := int((~np.isfinite(values)).sum())):
            raise ValueError(
                f"{_place(run)}: {bad} of {values.size} numbers are not finite in the {what}; "
                "look at that run's training, then evaluate it again"
            )


def _require_same_rows(runs: Sequence[ArmRun]) -> None:
    """The same rows everywhere; within a seed also the same captions and the same answers of the teacher."""
    for run in runs:
        _require_same(run, runs[0])
        _require_same(run, next(other for other in runs if other.scores.seed == run.scores.seed))


def _require_same(run: ArmRun, other: ArmRun) -> None:
    ours, theirs = run.scores, other.scores
    same = {
        "held-out rows (data.heldout, evaluate.images)": ours.keys == theirs.keys,
        "timesteps (evaluate.timesteps)": ours.timesteps == theirs.timesteps,
        "features (evaluate.features)": ours.extractor == theirs.extractor,
    }
    if ours.seed == theirs.seed:
        same["captions (data.max_captions)"] = ours.captions == theirs.captions
        same["losses of the teacher (model.pipeline)"] = _same_teacher(ours, theirs)
    for what, holds in same.items():
        if not holds:
            raise ValueError(
                f"{_place(run)}: its {what} differ from those of {_place(other)}; "
                "evaluate both with the same data, model and section `evaluate`"
            )


def _same_teacher(ours: RunScores, theirs: RunScores) -> bool:
    a, b = ours.teacher.losses[0], theirs.teacher.losses[0]
    return a.shape == b.shape and bool(np.abs(a - b).max() <= SAME_TEACHER * np.abs(b).mean())


def require_on_budget(trial: Trial, tolerance: float) -> None:
    """ValueError if an arm's mean cost is further from the budget than this share of it; the oracle may cost less."""
    budget = trial.method.budget
    for name, arm in trial.arms.items():
        cost = float(arm.costs.mean())
        if name not in (TEACHER, ORACLE) and abs(cost / budget - 1) > tolerance:
            raise ValueError(
                f"{name}: costs {cost:.4f} of the full model as routed at seed {trial.method.seed}, more than "
                f"{tolerance:.0%} off the budget, {budget:g}; arms are compared at equal cost only: train it again"
            )


def _place(run: ArmRun) -> str:
    return f"{run.arm} at budget {run.scores.budget:g}, seed {run.scores.seed}"
