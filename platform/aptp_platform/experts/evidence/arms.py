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

from aptp_platform.experts.evidence.intervals import mean_interval, rank_correlation, rank_interval

TEACHER: Final = "teacher"
ROUTED: Final = "routed"
RANDOM: Final = "random_routing"
ORACLE: Final = "oracle"
LEAST_OF_A_KIND: Final = 8  # prompts, for a kind's mean to be shown


@dataclass(frozen=True)
class Network:
    """What one network was measured at on every row.

    Attributes:
        losses: at one or two noises. distances: mean squared difference from the teacher's predictions at the first
            noise. cost: share of the full model's MACs. milliseconds: of one forward pass of a batch. steps: of
            fine-tuning, of this network alone.
    """

    losses: Float[np.ndarray, "noise row"]
    distances: Float[np.ndarray, " row"]
    cost: float
    milliseconds: float
    steps: int = 0


@dataclass(frozen=True)
class Arm:
    """Per row: loss at the first noise, distance from the teacher, cost, and the milliseconds of a batch."""

    losses: Float[np.ndarray, " row"]
    distances: Float[np.ndarray, " row"]
    costs: Float[np.ndarray, " row"]
    milliseconds: Float[np.ndarray, " row"]


def build_arms(
    teacher: Network, experts: Sequence[Network], codes: Int[np.ndarray, " row"], singles: Mapping[str, Network]
) -> dict[str, Arm]:
    """Every arm by its name.

    Args:
        experts: measured at two noises. codes: the router's. singles: the networks that each answer for all prompts.
    """
    usage = np.bincount(codes, minlength=len(experts)) / len(codes)
    routed = arm_of(experts, codes)
    second, costs = np.stack([expert.losses[1] for expert in experts], axis=1), _costs(experts)
    return {
        TEACHER: arm_of([teacher], np.zeros_like(codes)),
        ROUTED: routed,
        RANDOM: Arm(*(usage @ values for values in _tables(experts))),
        ORACLE: arm_of(experts, _cheapest_best(second, costs, float(routed.costs.mean()))),
        **{name: arm_of([network], np.zeros_like(codes)) for name, network in singles.items()},
    }


def arm_of(networks: Sequence[Network], choice: Int[np.ndarray, " row"]) -> Arm:
    """Each row by the network that is chosen for it."""
    rows = np.arange(len(choice))
    return Arm(*(values[choice, rows] for values in _tables(networks)))


def _tables(networks: Sequence[Network]) -> list[Float[np.ndarray, "network row"]]:
    """The fields of an `Arm`, of every network on every row."""
    rows = networks[0].losses.shape[1]
    return [
        np.stack([network.losses[0] for network in networks]),
        np.stack([network.distances for network in networks]),
        np.repeat(_costs(networks)[:, None], rows, axis=1),
        np.repeat(np.array([network.milliseconds for network in networks])[:, None], rows, axis=1),
    ]


def _costs(networks: Sequence[Network]) -> Float[np.ndarray, " network"]:
    return np.array([network.cost for network in networks])


def need_of(teacher: Network, experts: Sequence[Network]) -> Float[np.ndarray, " row"]:
    """What the experts lose on a prompt, on average over all of them: the same for every way to route."""
    return np.mean([expert.losses[0] for expert in experts], axis=0) - teacher.losses[0]


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
        facts[name] = {
            "cost_ratio": float(arm.costs.mean()),
            "denoising_loss": float(arm.losses.mean()),
            "teacher_distance": float(arm.distances.mean()),
            "ms": float(arm.milliseconds.mean()),
        }
        if name != TEACHER:
            extra = arm.losses - teacher
            facts[name] |= {"extra_loss": float(extra.mean()), "extra_loss_95": mean_interval(extra[None])}
    return facts


def routed_minus(arms: Mapping[str, Arm]) -> dict[str, dict[str, Any]]:
    """What the routed experts lose more than each other arm, prompt by prompt; below zero they are better."""
    found = {}
    for name, arm in arms.items():
        if name not in (TEACHER, ROUTED):
            difference = arms[ROUTED].losses - arm.losses
            found[name] = {"mean": float(difference.mean()), "95": mean_interval(difference[None])}
    return found


def need_capacity(
    teacher: Network,
    experts: Sequence[Network],
    capacity: Float[np.ndarray, " row"],
    predicted: Float[np.ndarray, "row code"] | None,
) -> dict[str, Any]:
    """Whether capacity follows need, and how well the router predicts need.

    spearman: of a prompt's need and the cost that it is given. predicted: beside the losses that the router predicts
    for every prompt and expert, those that were measured.
    """
    need = need_of(teacher, experts)
    pair = need[None], capacity[None]
    facts: dict[str, Any] = {"spearman": rank_correlation(*pair), "95": rank_interval(*pair)}
    if predicted is not None:
        measured = np.stack([expert.losses[0] - teacher.losses[0] for expert in experts], axis=1)
        facts["predicted"] = {
            "mean": [float(value) for value in predicted.mean(0)],
            "measured_mean": [float(value) for value in measured.mean(0)],
            "mean_absolute_error": float(np.abs(predicted - measured).mean()),
            "spearman": rank_correlation(predicted.mean(1)[None], need[None]),
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
