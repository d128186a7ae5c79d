"""Whether the prompts that come are still the prompts that the codes were trained for."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass


def js_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Jensen-Shannon distance of two distributions over the same outcomes, in bits: 0 if equal, 1 if disjoint.

    sqrt((KL(p, m) + KL(q, m)) / 2) with m = (p + q) / 2 (Endres and Schindelin 2003). scipy's
    `jensenshannon` is NaN where rounding makes that sum negative, as it does for nearly equal distributions.
    """

    def divergence(p: Sequence[float]) -> float:
        means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        return sum(a * math.log2(a / m) for a, m in zip(p, means, strict=True) if a > 0)

    return math.sqrt(max(0.0, (divergence(first) + divergence(second)) / 2))


@dataclass(frozen=True)
class Drift:
    """distance: of the recent codes' shares from the training's. unknown_rate: of the recent prompts."""

    distance: float
    unknown_rate: float


class DriftMonitor:
    """The last `window` routes beside the training's."""

    def __init__(self, shares: Sequence[float], window: int = 1000) -> None:
        total = sum(shares)
        self._shares = [share / total for share in shares]
        self._window = window
        self._recent: deque[tuple[int, bool]] = deque()
        self._counts: Counter[int] = Counter()
        self._unknown = 0

    def observe(self, code: int, *, unknown: bool) -> Drift:
        """Adds a route; the drift now. It is 0 until a tenth of the window is filled: few routes say nothing."""
        if len(self._recent) == self._window:
            oldest, was_unknown = self._recent.popleft()
            self._counts[oldest] -= 1
            self._unknown -= was_unknown
        self._recent.append((code, unknown))
        self._counts[code] += 1
        self._unknown += unknown
        count = len(self._recent)
        if count * 10 < self._window:
            return Drift(0.0, 0.0)
        recent = [self._counts[index] / count for index in range(len(self._shares))]
        return Drift(js_distance(recent, self._shares), self._unknown / count)
