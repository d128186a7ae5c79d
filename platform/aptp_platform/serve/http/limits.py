"""Rate limits: in multiply-adds per key, what one request took from it, and how fast wrong keys are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aptp_platform.serve.messages import ApiError

_WRONG_KEYS_PER_S: Final = 5.0  # answered; whoever sends more of them waits
_FREE_WRONG_KEYS: Final = 10  # at once: a mistake is told at once
_MOST_PAUSE_S: Final = 5.0
_MOST_PAUSED: Final = 64  # connections that wait for such an answer; more are turned away


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


class WrongKeys:
    """Answers wrong keys slowly once they are many; right ones never wait for them."""

    def __init__(self) -> None:
        self._recent, self._last, self._paused = 0.0, time.monotonic(), 0

    async def pause(self) -> None:
        """Before a wrong key is refused.

        Raises:
            ApiError: 429 where too many wait already.
        """
        now = time.monotonic()
        self._recent = max(0.0, self._recent - _WRONG_KEYS_PER_S * (now - self._last)) + 1
        self._last = now
        seconds = min((self._recent - _FREE_WRONG_KEYS) / _WRONG_KEYS_PER_S, _MOST_PAUSE_S)
        if seconds <= 0:
            return
        if self._paused >= _MOST_PAUSED:
            self._recent -= 1  # it is not answered
            message = f"Too many wrong API keys; try again in {seconds:.0f} s."
            raise ApiError(429, message, code="too_many_wrong_keys", retry_after_s=seconds)
        self._paused += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._paused -= 1
