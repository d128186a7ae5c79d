"""Rate limits in multiply-adds: a token bucket per key, and what one request took from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


class MacsBucket:
    """A token bucket over multiply-adds, by the clock that is given.

    A request is admitted while anything is left, and charged whole. One that is larger than the burst is served too;
    its key waits longer afterwards.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._filled = burst, clock()

    def level(self, share: float = 1.0) -> float:
        """Multiply-adds that are left now; below zero after a large request. share: of the limit that counts here."""
        now = self._clock()
        self._level = min(self._level + share * self._rate * (now - self._filled), share * self._burst)
        self._filled = now
        return self._level

    def take(self, macs: float, share: float = 1.0) -> float:
        """0, and the amount is charged; or the seconds until it would be."""
        level = self.level(share)
        if level <= 0:
            return max(-level / (share * self._rate), 0.001)
        self._level -= macs
        return 0.0

    def give_back(self, macs: float) -> None:
        self._level += macs


@dataclass
class QuotaCharge:
    """What a request was charged: the most that it can cost, until the choice of its model is known."""

    macs: float
    bucket: MacsBucket | None

    def correct(self, macs: float) -> None:
        if self.bucket is not None:
            self.bucket.give_back(self.macs - macs)
        self.macs = macs
