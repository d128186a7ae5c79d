"""The arms of an evaluation: the same prompts, assigned to networks in several ways at the same cost.

    routed           each prompt by the expert that the router gives it
    random_routing   the same experts, each with as many prompts as routed but drawn at random: the mean of all draws
    oracle           each prompt by its best expert, at the routed cost; chosen at other noise than it is scored at
    uniform, ...     one network for all prompts

An arm's extra loss is what it loses to the teacher on the same rows, noise and timesteps. Intervals are bootstrapped
over prompts; where two arms are compared, over the prompts' differences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import bootstrap, spearmanr

TEACHER: Final = "teacher"
ROUTED: Final = "routed"
RANDOM: Final = "random_routing"
ORACLE: Final = "oracle"
LEAST_OF_A_KIND: Final = 8  # prompts, for a kind's mean to be shown


@dataclass(frozen=True)
class Arm:
    """A loss per row, at the first noise, and what each row cost as a share of the full model's MACs."""

    losses: Float[np.ndarray, " row"]
    costs: Float[np.ndarray, " row"]


def build_arms(
    teacher: Float[np.ndarray, " row"],
    experts: Float[np.ndarray, "code noise row"],
    codes: Int[np.ndarray, " row"],
    costs: Float[np.ndarray, " code"],
    singles: Mapping[str, tuple[Float[np.ndarray, " row"], float]],
) -> dict[str, Arm]:
    """Every arm by its name.

    Args:
        experts: losses of every expert on every row, at two noises. codes: the router's. costs: the experts'.
        singles: the losses and the cost of each network that answers for all prompts.
    """
    rows = np.arange(len(codes))
    usage = np.bincount(codes, minlength=len(costs)) / len(codes)
    best = _cheapest_best(experts[:, 1].T, costs, float(costs[codes].mean()))
    return {
        TEACHER: Arm(teacher, np.ones(len(codes))),
        ROUTED: Arm(experts[codes, 0, rows], costs[codes]),
        RANDOM: Arm(usage @ experts[:, 0], np.full(len(codes), float(usage @ costs))),
        ORACLE: Arm(experts[best, 0, rows], costs[best]),
        **{name: Arm(losses, np.full(len(codes), cost)) for name, (losses, cost) in singles.items()},
    }


def _cheapest_best(
    losses: Float[np.ndarray, "row code"], costs: Float[np.ndarray, " code"], budget: float
) -> Int[np.ndarray, " row"]:
    """Each row's best code at one price: the lowest at which the rows cost no more than the budget."""
    low, high = 0.0, float(np.ptp(losses)) / max(float(np.ptp(costs)), 1e-9) + 1e-9
    if costs[losses.argmin(1)].mean() <= budget:
        return losses.argmin(1)
    for _ in range(60):
        price = (low + high) / 2
        low, high = (price, high) if costs[(losses + price * costs).argmin(1)].mean() > budget else (low, price)
    return (losses + high * costs).argmin(1)


def arm_facts(arms: Mapping[str, Arm]) -> dict[str, dict[str, Any]]:
    """Cost and loss of each arm, and what it loses to the teacher, with a 95 % interval."""
    teacher = arms[TEACHER].losses
    facts: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        facts[name] = {"cost_ratio": float(arm.costs.mean()), "denoising_loss": float(arm.losses.mean())}
        if name != TEACHER:
            extra = arm.losses - teacher
            facts[name] |= {"extra_loss": float(extra.mean()), "extra_loss_95": mean_interval(extra)}
    return facts


def routed_minus(arms: Mapping[str, Arm]) -> dict[str, dict[str, Any]]:
    """What the routed experts lose more than each other arm, prompt by prompt; below zero they are better."""
    found = {}
    for name, arm in arms.items():
        if name not in (TEACHER, ROUTED):
            difference = arms[ROUTED].losses - arm.losses
            found[name] = {"mean": float(difference.mean()), "95": mean_interval(difference)}
    return found


def need_capacity(
    teacher: Float[np.ndarray, " row"],
    experts: Float[np.ndarray, "code noise row"],
    capacity: Float[np.ndarray, " row"],
    predicted: Float[np.ndarray, "row code"] | None,
) -> dict[str, Any]:
    """Whether capacity follows need, and how well the router predicts need.

    A prompt's need is what the experts lose on it on average. spearman: of need and the cost that the prompt is given.
    predicted: beside the losses that the router predicts for every prompt and expert, those that were measured.
    """
    need = experts[:, 0].mean(0) - teacher
    facts: dict[str, Any] = {"spearman": _spearman(need, capacity), "95": _spearman_interval(need, capacity)}
    if predicted is not None:
        measured = (experts[:, 0] - teacher).T
        facts["predicted"] = {
            "mean": [float(value) for value in predicted.mean(0)],
            "measured_mean": [float(value) for value in measured.mean(0)],
            "mean_absolute_error": float(np.abs(predicted - measured).mean()),
            "spearman": _spearman(predicted.mean(1), need),
        }
    return facts


def kind_facts(
    kinds: Sequence[str], need: Float[np.ndarray, " row"], capacity: Float[np.ndarray, " row"]
) -> dict[str, dict[str, Any]]:
    """Mean need and capacity by kind of prompt, for kinds with enough prompts; the router never sees the kind."""
    table = {}
    for kind in sorted(set(kinds)):
        mine = np.array([each == kind for each in kinds])
        if mine.sum() >= LEAST_OF_A_KIND:
            table[kind] = {
                "rows": int(mine.sum()),
                "need": float(need[mine].mean()),
                "cost_ratio": float(capacity[mine].mean()),
            }
    return table


def mean_interval(values: Float[np.ndarray, " row"]) -> tuple[float, float]:
    """A bootstrap 95 % interval of the mean."""
    if len(values) < 2:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


def _spearman(x: Float[np.ndarray, " row"], y: Float[np.ndarray, " row"]) -> float | None:
    """None where one side is constant."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def _spearman_interval(x: Float[np.ndarray, " row"], y: Float[np.ndarray, " row"]) -> tuple[float, float] | None:
    if _spearman(x, y) is None:
        return None
    draws = np.random.default_rng(0).integers(len(x), size=(500, len(x)))
    found = [value for draw in draws if (value := _spearman(x[draw], y[draw])) is not None]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
