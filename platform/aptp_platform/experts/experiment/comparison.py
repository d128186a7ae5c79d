"""The method beside its opponents, over budgets and seeds: one dictionary of metrics from the saved scores of runs.

Every opponent is a run of its own, trained by the same path with another config and scored on the same held-out rows,
noise and timesteps. Nothing here computes with a network or with Ray.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from aptp_platform.experts.evidence.agreement import adjusted_mutual_information, first_words, nearest_centres
from aptp_platform.experts.evidence.arms import ORACLE, RANDOM, ROUTED, TEACHER, kind_facts, need_of
from aptp_platform.experts.evidence.intervals import (
    Resamples,
    mean_interval,
    mean_ratio,
    rank_correlation,
    rank_interval,
)
from aptp_platform.experts.evidence.scores import RunScores
from aptp_platform.experts.evidence.trials import ArmRun, Trial, gather, require_on_budget

BUDGET_TOLERANCE: Final = 0.01
IMAGE_SCORES: Final = ("fd_lite0", "cmmd_lite0", "fid", "cmmd", "clip_score")


def compare(runs: Sequence[ArmRun], *, tolerance: float = BUDGET_TOLERANCE) -> dict[str, Any]:
    """The metrics of every arm at every budget, with 95 % intervals over seeds and prompts (see `intervals`).

    Args:
        runs: in any order; at each budget every arm must be there at each seed.
        tolerance: how far an arm's mean cost may be from the budget, as a share of it. The oracle may cost less.

    Returns:
        plain data: `seeds`, the number of `rows`, and by budget (`"0.35"`)
        `arms`: cost, extra loss over the teacher, distance from the teacher's predictions, image scores (None where not
        measured), `ms` of a forward pass and fine-tuning `steps` of all networks of the arm together;
        `routed_minus`: the method's extra loss minus each other arm's, and over it (`ratio`);
        `need_capacity`: rank correlation of a prompt's need and the cost that it is given, and both by kind;
        `oracle_gap`: what the method and random routing lose more than the oracle, and the share of the gap between
        these two that routing closes;
        `agreement`: adjusted mutual information of the codes, and of as many k-means clusters of the embeddings, with
        the prompts' kinds and with the captions' first words.

    Raises:
        ValueError: runs do not belong together, an arm is missing or off the budget, or a number is not finite.
    """
    trials = gather(runs)
    for trial in trials:
        require_on_budget(trial, tolerance)
    budgets = sorted({trial.method.budget for trial in trials})
    first = trials[0].method
    return {
        "seeds": sorted({trial.method.seed for trial in trials}),
        "rows": len(first.keys),
        "generated": len(next(iter(first.features.values()), ())),
        "extractor": first.extractor,
        "device": first.device,
        "batch_size": first.batch_size,
        "budgets": {
            budget_key(budget): _at_one_budget([trial for trial in trials if trial.method.budget == budget])
            for budget in budgets
        },
    }


def budget_key(budget: float) -> str:
    return f"{budget:g}"


def _at_one_budget(trials: Sequence[Trial]) -> dict[str, Any]:
    resamples = Resamples.of(len(trials), len(trials[0].method.keys))
    extra = {
        name: np.stack([trial.arms[name].losses - trial.arms[TEACHER].losses for trial in trials])
        for name in trials[0].arms
    }
    return {
        "seeds": [trial.method.seed for trial in trials],
        "arms": {name: _arm_facts(name, trials, extra[name], resamples) for name in extra},
        "routed_minus": {
            name: _minus(extra[ROUTED], extra[name], resamples) for name in extra if name not in (TEACHER, ROUTED)
        },
        "need_capacity": _need_capacity(trials),
        "oracle_gap": _oracle_gap(extra, resamples),
        "agreement": _agreement([trial.method for trial in trials]),
    }


def _arm_facts(
    name: str, trials: Sequence[Trial], extra: Float[np.ndarray, "seed row"], resamples: Resamples
) -> dict[str, Any]:
    arms = [trial.arms[name] for trial in trials]
    distances = np.stack([arm.distances for arm in arms])
    images = [trial.images.get(name, {}) for trial in trials]
    return {
        "cost_ratio": float(np.mean([arm.costs.mean() for arm in arms])),
        "extra_loss": float(extra.mean()),
        "extra_loss_95": list(mean_interval(extra, resamples)),
        "teacher_distance": float(distances.mean()),
        "teacher_distance_95": list(mean_interval(distances, resamples)),
        **{score: _mean_or_none([found.get(score) for found in images]) for score in IMAGE_SCORES},
        "ms": float(np.mean([arm.milliseconds.mean() for arm in arms])),
        "steps": trials[0].steps[name],
    }


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _minus(
    ours: Float[np.ndarray, "seed row"], theirs: Float[np.ndarray, "seed row"], resamples: Resamples
) -> dict[str, Any]:
    ratio, interval = mean_ratio(ours, theirs, resamples)
    return {**_difference(ours - theirs, resamples), "ratio": ratio, "ratio_95": interval and list(interval)}


def _difference(values: Float[np.ndarray, "seed row"], resamples: Resamples) -> dict[str, Any]:
    return {"mean": float(values.mean()), "95": list(mean_interval(values, resamples))}


def _need_capacity(trials: Sequence[Trial]) -> dict[str, Any]:
    need = np.stack([need_of(trial.method.teacher, trial.method.experts) for trial in trials])
    capacity = np.stack([trial.arms[ROUTED].costs for trial in trials])
    interval = rank_interval(need, capacity)
    return {
        "spearman": rank_correlation(need, capacity),
        "95": interval and list(interval),
        "by_kind": kind_facts(trials[0].method.kinds, need.mean(0), capacity.mean(0)),
    }


def _oracle_gap(extra: Mapping[str, Float[np.ndarray, "seed row"]], resamples: Resamples) -> dict[str, Any]:
    """`closed`: 1 where routing is as good as the oracle, 0 where it is as good as random routing."""
    routed, whole = extra[RANDOM] - extra[ROUTED], extra[RANDOM] - extra[ORACLE]
    closed, interval = mean_ratio(routed, whole, resamples)
    return {
        "routed_minus_oracle": _difference(extra[ROUTED] - extra[ORACLE], resamples),
        "random_minus_oracle": _difference(whole, resamples),
        "closed": closed,
        "closed_95": interval and list(interval),
    }


def _agreement(runs: Sequence[RunScores]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run in runs:
        clusters = nearest_centres(run.embeddings, len(run.experts))
        for grouping, prefix in ((run.codes, ""), (clusters, "kmeans_")):
            for name, truth in (("kinds", run.kinds), ("template", first_words(run.captions))):
                found.setdefault(prefix + name, []).append(adjusted_mutual_information(grouping, truth))
    return {name: float(np.mean(values)) for name, values in found.items()}
