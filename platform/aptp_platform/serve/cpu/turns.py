"""Turns: of the replicas on one device only so many compute a step at once, first the one whose request waits longest.

Left to the operating system (or to a GPU's time slices), all models that are busy share the device evenly, so that each
image takes as long as all of them together. With turns between steps, the requests that are furthest behind come first,
and the tail of the latencies is shorter. Only an engine that works step by step has turns so short to offer.

Who gives a turn back and wants the next one says so in the same breath. Otherwise a device would go to somebody else
between any two steps, however little that one's request is behind.

A turn is a semaphore that the kernel gives back when its holder is killed; who waits says since when its request does,
in a table that all processes map. It is a courtesy and no lock: no step waits for its turn longer than
`patience_s`, and none at all once the semaphores were removed, so that what hangs or is tidied away does not stop the
others.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from aptp_platform.serve.cpu.semaphores import Semaphores, SemaphoresGoneError

_PATIENCE_S: Final = 30.0  # far above any step's turn
_LOOK_AGAIN_S: Final = 0.2  # who waits does so of itself: the one who should have woken it may be dead
_STALE_S: Final = 1.0  # a claim that nobody renewed for so long is that of a dead or hanging process
_TURNS, _MUTEX, _IS_SET, _FIRST_PLACE = 0, 1, 2, 3  # of the semaphores; one for each place follows, to wake who waits
_PLACES: Final = 64  # that may wait at once


class _Claim(NamedTuple):
    """Who waits for a turn. whose: a random number, 0 for a free place. since, renewed: `time.monotonic()`, which is
    one clock for all processes."""

    whose: int
    since: float
    renewed: float

    @property
    def counts(self) -> bool:
        return self.whose != 0 and time.monotonic() - self.renewed < _STALE_S


class _Claims:
    """The table of the places, in a file; every use of it wants the mutex."""

    _format: Final = struct.Struct("<Qdd")

    def __init__(self, file: int) -> None:
        size = self._format.size * _PLACES
        os.ftruncate(file, size)
        self._table = mmap.mmap(file, size)

    def __getitem__(self, place: int) -> _Claim:
        return _Claim(*self._format.unpack_from(self._table, place * self._format.size))

    def __setitem__(self, place: int, claim: _Claim) -> None:
        self._format.pack_into(self._table, place * self._format.size, *claim)

    def oldest(self) -> int | None:
        """The place of the one whose turn is next."""
        claims = ((place, self[place]) for place in range(_PLACES))
        waiting = [(claim.since, claim.whose, place) for place, claim in claims if claim.counts]
        return min(waiting)[2] if waiting else None

    def free(self) -> int | None:
        return next((place for place in range(_PLACES) if not self[place].counts), None)


_NOBODY: Final = _Claim(0, 0.0, 0.0)


class Turns:
    """`with turns.held(since): ...` waits for one of `at_once` turns.

    Processes of one user on one machine share the turns of a device, if they say the same `at_once`. Each waits with a
    `Turns` of its own, for one turn at a time.

    Raises:
        ValueError: this machine has no System V semaphores.
    """

    def __init__(self, device: str, at_once: int, *, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._whose, self._place = secrets.randbits(63) | 1, 0
        name = f"{os.getuid()} {device} {at_once} oldest first"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") & 0x7FFFFFFF | 1
        descriptor = os.open(Path(tempfile.gettempdir()) / f"aptp-turns-{key:08x}", os.O_RDWR | os.O_CREAT, 0o600)
        try:  # created and set are two calls, and whoever comes between them must not find semaphores of nobody
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._semaphores = Semaphores(key, _FIRST_PLACE + _PLACES)
            if not self._semaphores.get(_IS_SET):
                self._semaphores.set(_TURNS, at_once)
                self._semaphores.set(_MUTEX, 1)
                self._semaphores.set(_IS_SET, 1)
            self._claims = _Claims(descriptor)
        except (ValueError, SemaphoresGoneError) as error:
            raise ValueError(f"turns: {error}; leave 'turns' unset") from None
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # the table keeps the file, and with it the lock
            os.close(descriptor)

    def acquire(self, since: float) -> bool:
        """Blocks until it is this caller's turn; False if that took too long, or there are no turns any more.

        since: `time.monotonic()` from when the request waits, for which the turn is wanted; the earliest comes first.
        """
        with suppress(SemaphoresGoneError):
            return self._wait(since, time.monotonic() + self._patience_s)
        return False

    def release(self, next_since: float | None = None) -> None:
        """Gives the turn back; next_since: the `since` of the `acquire` that follows at once, to be ranked already."""
        with suppress(SemaphoresGoneError), self._alone():
            if next_since is not None:
                self._claim(next_since)
            self._semaphores.add(_TURNS, undo=True)
            self._wake()

    @property
    def is_claimed(self) -> bool:
        """Whether a turn is kept for this caller, who said on `release` that the next one would be wanted."""
        claim = self._claims[self._place]
        return claim.whose == self._whose and claim.counts

    def withdraw(self) -> None:
        """Nothing more is wanted, whatever `release` was told."""
        with suppress(SemaphoresGoneError), self._alone():
            if self.is_claimed:
                self._claims[self._place] = _NOBODY
                self._wake()

    @contextmanager
    def held(self, since: float, then: Callable[[], float | None] = lambda: None) -> Iterator[None]:
        """A turn, as long as the block lasts; then: asked at its end for the `next_since` of `release`."""
        mine = self.acquire(since)
        try:
            yield
        finally:
            if mine:
                self.release(then())

    def _wait(self, since: float, ends: float) -> bool:
        while True:
            with self._alone():
                if not self._claim(since):
                    return False
                now = time.monotonic()
                mine = self._claims.oldest() == self._place and self._semaphores.take(_TURNS, 0.0, undo=True)
                if mine or now >= ends:
                    self._claims[self._place] = _NOBODY
                    self._wake()  # the next one, if there is a turn more
                    return mine
            self._semaphores.take(_FIRST_PLACE + self._place, min(_LOOK_AGAIN_S, ends - now), undo=False)

    def _claim(self, since: float) -> bool:
        """Takes or renews this caller's place; False if there is none."""
        if self._claims[self._place].whose != self._whose:  # it has none yet, or hung, and another has its place
            place = self._claims.free()
            if place is None:
                return False
            self._place = place
            self._semaphores.set(_FIRST_PLACE + place, 0)
        self._claims[self._place] = _Claim(self._whose, since, time.monotonic())
        return True

    def _wake(self) -> None:
        place = self._claims.oldest()
        if place is not None and self._semaphores.get(_TURNS):
            self._semaphores.add(_FIRST_PLACE + place, undo=False)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The table is this caller's meanwhile, unless somebody hangs while it is theirs."""
        held = self._semaphores.take(_MUTEX, _STALE_S, undo=True)
        try:
            yield
        finally:
            if held:
                self._semaphores.add(_MUTEX, undo=True)
