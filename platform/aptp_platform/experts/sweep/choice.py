"""Decisions of a sweep from numbers alone: which trial is stopped, which ones nobody beats, which one is chosen."""

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

SAME_COST: Final = 0.01  # of the full model's MACs: pruning meets its budget no closer


class Found(Protocol):
    """What a network or a trial loses more than the full model on held-out rows, and its MACs ratio there."""

    @property
    def extra_loss(self) -> float: ...

    @property
    def cost_ratio(self) -> float: ...


def falls_behind(own: Found, others: Sequence[Found]) -> bool:
    """The median rule: more than half of the others lost less at no higher cost.

    Cost counts because a trial that has pruned little so far loses little.

    Args:
        others: the other trials of the same budget, at the same step of the same training.
    """
    better = [
        other
        for other in others
        if other.extra_loss < own.extra_loss and other.cost_ratio <= own.cost_ratio + SAME_COST
    ]
    return 2 * len(better) > len(others)


def pareto_set(found: Sequence[Found]) -> list[int]:
    """Indices of those that no other beats: it loses no more and costs no more, and one of the two is less.

    Costs are compared as hundredths, since smaller differences are none of the trials'.
    """
    points = [(round(each.cost_ratio, 2), each.extra_loss) for each in found]

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [index for index, point in enumerate(points) if not any(beats(other, point) for other in points)]


def choose(found: Sequence[Found], budget: float) -> tuple[int, str]:
    """The index of the one to use, among at least one, and the rule that chose it."""
    pareto = pareto_set(found)
    fitting = [index for index in pareto if found[index].cost_ratio <= budget + SAME_COST]
    if fitting:
        best = min(fitting, key=lambda index: found[index].extra_loss)
        return best, f"the lowest held-out extra loss of the Pareto trials within router.budget {budget:g}"
    return _knee(found, pareto), f"the knee of the Pareto trials, since none is within router.budget {budget:g}"


def _knee(found: Sequence[Found], pareto: list[int]) -> int:
    """The one nearest to the best of both, each scaled to the set's range."""
    both = np.array([[found[index].cost_ratio, found[index].extra_loss] for index in pareto])
    scaled = (both - both.min(0)) / np.maximum(np.ptp(both, axis=0), 1e-12)
    return pareto[int(np.linalg.norm(scaled, axis=1).argmin())]
