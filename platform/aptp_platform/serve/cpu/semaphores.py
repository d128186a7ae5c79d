"""A set of System V semaphores: waiting costs nothing, and the kernel gives back what a killed process held."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import sys
from typing import Final

_CREATE: Final = 0o1000 | 0o600  # IPC_CREAT, for this user
_GET_VALUE, _SET_VALUE, _REMOVE, _NO_WAIT, _UNDO = 12, 16, 0, 0o4000, 0x1000


class _Operation(ctypes.Structure):
    _fields_ = (("which", ctypes.c_ushort), ("change", ctypes.c_short), ("flags", ctypes.c_short))


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class SemaphoresGoneError(RuntimeError):
    """Somebody removed the set (`ipcrm`)."""


class Semaphores:
    """The set of `count` semaphores under a key, created with zeros if this machine has none.

    Raises:
        ValueError: this machine has no such semaphores (not Linux, or forbidden by its sandbox).
    """

    def __init__(self, key: int, count: int) -> None:
        if not sys.platform.startswith("linux"):
            raise ValueError("this system has no System V semaphores")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._id = self._libc.semget(key, count, _CREATE)
        if self._id < 0:
            raise ValueError(f"this machine gives no System V semaphores ({os.strerror(ctypes.get_errno())})")

    def get(self, which: int) -> int:
        return self._checked(self._libc.semctl(self._id, which, _GET_VALUE))

    def set(self, which: int, value: int) -> None:
        self._checked(self._libc.semctl(self._id, which, _SET_VALUE, ctypes.c_int(value)))

    def add(self, which: int, *, undo: bool) -> None:
        """Adds 1. undo: takes back what this process had taken, so that its end does not do so once more."""
        self._change(which, 1, 0.0, undo=undo)

    def take(self, which: int, timeout_s: float, *, undo: bool) -> bool:
        """Takes 1 away as soon as that leaves no less than 0; False if it did not within the time.

        undo: the kernel adds it again when this process ends, however it does.

        Raises:
            SemaphoresGoneError: there is no such set any more.
        """
        return self._change(which, -1, timeout_s, undo=undo)

    def remove(self) -> None:
        self._checked(self._libc.semctl(self._id, 0, _REMOVE))

    def _change(self, which: int, by: int, timeout_s: float, *, undo: bool) -> bool:
        flags = (_UNDO if undo else 0) | (0 if timeout_s > 0 else _NO_WAIT)
        operation = _Operation(which, by, flags)
        fraction, seconds = math.modf(timeout_s)
        time = _Time(int(seconds), int(fraction * 1e9))
        if self._libc.semtimedop(self._id, ctypes.byref(operation), 1, ctypes.byref(time)) == 0:
            return True
        if ctypes.get_errno() in (errno.EAGAIN, errno.EINTR):
            return False
        raise SemaphoresGoneError(os.strerror(ctypes.get_errno()))

    def _checked(self, result: int) -> int:
        if result < 0:
            raise SemaphoresGoneError(os.strerror(ctypes.get_errno()))
        return result
