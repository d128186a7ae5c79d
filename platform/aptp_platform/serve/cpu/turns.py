"""Turns between the replicas that share a machine's cores: so many compute a step at once, the oldest request's first.

Left to the operating system, all busy replicas share the cores evenly, and every image takes as long as all of them
together. With turns between steps the request that is furthest behind comes first, which shortens the tail of the
latencies: `make bench-ablation` measures by how much.

A turn is a lock on a file, which the kernel gives back when its holder dies. Whoever waits says since when its request
does, in a table that all processes map, and looks again every few milliseconds. It is a courtesy: no step waits for its
turn longer than `patience_s`, and a claim that nobody renews does not count, so what hangs does not stop the others.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PATIENCE_S: Final = 30.0  # far above any step
_LOOK_S: Final = 0.002  # between two looks; a step takes a hundred times as long
_STALE_S: Final = 0.5  # a claim that was not renewed for so long is that of a dead or hanging process
_PLACES: Final = 64  # that may wait at once
_CLAIM: Final = struct.Struct("<Qdd")  # whose (0: a free place), since when it waits, when that was renewed
_DEAREST: Final = 0.02  # of a step's time, which asking for a turn may take


class Turns:
    """`acquire` waits for one of `at_once` turns, `release` gives it back.

    Processes of one user on one machine share the turns of a name, if they say the same `at_once`. Each waits with a
    `Turns` of its own, for one turn at a time. Times are `time.monotonic()`, one clock for all processes.

    Raises:
        ValueError: the temporary folder does not let this user share lock files.
    """

    def __init__(self, name: str, at_once: int, *, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s, self._whose, self._place = patience_s, secrets.randbits(63) | 1, 0
        self._held: int | None = None
        folder = Path(tempfile.gettempdir()) / f"aptp-turns-{os.getuid()}-{name}-{at_once}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
                raise OSError("it belongs to somebody else")
            self._mutex = os.open(folder / "claims", os.O_RDWR | os.O_CREAT, 0o600)
            self._slots = [os.open(folder / f"turn-{each}", os.O_RDWR | os.O_CREAT, 0o600) for each in range(at_once)]
            os.ftruncate(self._mutex, _CLAIM.size * _PLACES)
            self._table = mmap.mmap(self._mutex, _CLAIM.size * _PLACES)
        except OSError as error:
            raise ValueError(f"turns: {folder}: cannot be shared ({error}); set turns to false") from None

    def acquire(self, since: float) -> bool:
        """Blocks until it is this caller's turn; False if that took too long.

        since: from when the request waits, for which the turn is wanted; the earliest comes first.
        """
        ends = time.monotonic() + self._patience_s
        while True:
            with self._alone():
                if not self._claim(since):
                    return False  # more wait than there are places
                if self._is_next() and self._take():
                    self._withdraw()
                    return True
                if time.monotonic() >= ends:
                    self._withdraw()
                    return False
            time.sleep(_LOOK_S)

    def release(self, next_since: float | None = None) -> None:
        """Gives the turn back. next_since: of the `acquire` that follows at once, so that it is ranked already."""
        with self._alone():
            if next_since is None:
                self._withdraw()
            else:
                self._claim(next_since)
            if self._held is not None:
                fcntl.flock(self._held, fcntl.LOCK_UN)
                self._held = None

    def look(self) -> None:
        """What asking for a turn costs whoever need not wait."""
        with self._alone():
            if self._claim(time.monotonic()):
                self._is_next()
                self._withdraw()

    def close(self) -> None:
        """Gives everything back; nobody asks this object again."""
        self.release()
        self._table.close()
        for descriptor in (self._mutex, *self._slots):
            os.close(descriptor)

    def _is_next(self) -> bool:
        now = time.monotonic()
        claims = (_CLAIM.unpack_from(self._table, place * _CLAIM.size) for place in range(_PLACES))
        waiting = [(since, whose) for whose, since, renewed in claims if whose and now - renewed < _STALE_S]
        return min(waiting)[1] == self._whose

    def _take(self) -> bool:
        for slot in self._slots:
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            self._held = slot
            return True
        return False

    def _claim(self, since: float) -> bool:
        """Take or renew this caller's place; False if there is none."""
        now = time.monotonic()
        if self._read(self._place)[0] != self._whose:
            stale = (
                place for place in range(_PLACES) if not (kept := self._read(place))[0] or now - kept[2] > _STALE_S
            )
            place = next(stale, None)
            if place is None:
                return False
            self._place = place
        self._write((self._whose, since, now))
        return True

    def _withdraw(self) -> None:
        if self._read(self._place)[0] == self._whose:
            self._write((0, 0.0, 0.0))

    def _read(self, place: int) -> tuple[int, float, float]:
        whose, since, renewed = _CLAIM.unpack_from(self._table, place * _CLAIM.size)
        return whose, since, renewed

    def _write(self, claim: tuple[int, float, float]) -> None:
        _CLAIM.pack_into(self._table, self._place * _CLAIM.size, *claim)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The table is this caller's meanwhile."""
        fcntl.flock(self._mutex, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._mutex, fcntl.LOCK_UN)


def turns_if_cheap(name: str, at_once: int, step: Callable[[], object]) -> Turns | None:
    """Turns for a replica, if asking for one takes next to nothing beside its `step`; both are measured here."""
    turns = Turns(name, at_once)
    started = time.monotonic()
    turns.look()
    looked = time.monotonic()
    step()
    if looked - started > _DEAREST * (time.monotonic() - looked):
        turns.close()
        return None
    return turns
