"""Turns: of the replicas on one device only so many compute a step at once, in the order in which they asked.

Left to the operating system (or to a GPU's time slices), all models that are busy share the device evenly, so that each
image takes as long as all of them together. Taking turns between steps, the same work ends in the order in which it
came, and the tail of the latencies is shorter. Only an engine that works step by step has turns so short to offer.

A turn is a System V semaphore: waiting costs nothing, and the kernel gives back what a killed process held. It is a
courtesy and no lock: no step waits for its turn longer than `patience_s`, and none at all once the semaphore was
removed, so that what hangs or is tidied away does not stop the others.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

_CREATE: Final = 0o1000 | 0o600  # IPC_CREAT, for this user
_GET_VALUE, _SET_VALUE, _UNDO = 12, 16, 0x1000
_PATIENCE_S: Final = 30.0  # far above any step's turn


class _Operation(ctypes.Structure):
    _fields_ = (("which", ctypes.c_ushort), ("change", ctypes.c_short), ("flags", ctypes.c_short))


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Turns:
    """`async with turns.taken(thread): ...` holds one of `at_once` turns; who waits does so on `thread`.

    Processes of one user on one machine share the turns of a device, if they say the same `at_once`.

    Raises:
        ValueError: this machine has no such semaphores (not Linux, or forbidden by its sandbox).
    """

    def __init__(self, device: str, at_once: int, *, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        name = f"{os.getuid()} {device} {at_once}"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") & 0x7FFFFFFF | 1
        if not sys.platform.startswith("linux"):
            raise ValueError("turns: there are none on this system; leave 'turns' unset")
        self._libc = ctypes.CDLL(None, use_errno=True)
        # Created and set are two calls, and whoever comes between them must not find a semaphore of nobody.
        with (Path(tempfile.gettempdir()) / f"aptp-turns-{key:08x}").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            self._id = self._checked(self._libc.semget(key, 2, _CREATE))
            turns, is_set = 0, 1
            if not self._checked(self._libc.semctl(self._id, is_set, _GET_VALUE)):
                self._checked(self._libc.semctl(self._id, turns, _SET_VALUE, ctypes.c_int(at_once)))
                self._checked(self._libc.semctl(self._id, is_set, _SET_VALUE, ctypes.c_int(1)))

    def acquire(self) -> bool:
        """Blocks until it is this caller's turn; False if that took too long, or there are no turns any more."""
        seconds, fraction = divmod(self._patience_s, 1)
        limit = _Time(int(seconds), int(fraction * 1e9))
        while self._change(-1, limit) < 0:
            if ctypes.get_errno() != errno.EINTR:
                return False
        return True

    def release(self) -> None:
        self._change(1, None)

    @asynccontextmanager
    async def taken(self, thread: Executor) -> AsyncIterator[None]:
        """Its turn lasts as long as the block."""
        turn = thread.submit(self.acquire)
        try:
            await asyncio.wrap_future(turn)
            yield
        finally:  # also when the caller was cancelled while it waited, whenever its turn comes then
            turn.add_done_callback(self._give_back)

    def _give_back(self, turn: Future[bool]) -> None:
        if not turn.cancelled() and turn.exception() is None and turn.result():
            self.release()

    def _change(self, by: int, limit: _Time | None) -> int:
        operation = _Operation(0, by, _UNDO)
        time = None if limit is None else ctypes.byref(limit)
        return int(self._libc.semtimedop(self._id, ctypes.byref(operation), 1, time))

    def _checked(self, result: Any) -> int:
        if result < 0:
            reason = os.strerror(ctypes.get_errno())
            raise ValueError(f"turns: this machine gives no semaphore ({reason}); leave 'turns' unset")
        return int(result)
