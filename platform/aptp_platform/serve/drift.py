"""Whether the prompts that come are still the prompts that the codes were trained for."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence


def js_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Jensen-Shannon distance of two distributions over the same outcomes, in bits: 0 if equal, 1 if disjoint.

    sqrt((KL(p, m) + KL(q, m)) / 2) with m = (p + q) / 2 (Endres and Schindelin 2003).
    """

    def divergence(p: Sequence[float]) -> float:
        means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        return sum(a * math.log2(a / m) for a, m in zip(p, means, strict=True) if a > 0)

    return math.sqrt(max(0.0, (divergence(first) + divergence(second)) / 2))


class DriftMonitor:
    """The shares of the last `window` routes beside the training shares."""

    def __init__(self, shares: Sequence[float], window: int = 1000) -> None:
        total = sum(shares)
        self._shares = [share / total for share in shares]
        self._recent: deque[int] = deque(maxlen=window)
        self._counts: Counter[int] = Counter()

    def observe(self, code: int) -> float:
        """Adds a route; the distance now. It is 0 until a tenth of the window is filled: few routes say nothing."""
        if len(self._recent) == self._recent.maxlen:
            self._counts[self._recent[0]] -= 1
        self._recent.append(code)
        self._counts[code] += 1
        if len(self._recent) * 10 < (self._recent.maxlen or 0):
            return 0.0
        return js_distance(
            [self._counts[index] / len(self._recent) for index in range(len(self._shares))], self._shares
        )
