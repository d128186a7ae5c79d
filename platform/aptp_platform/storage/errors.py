"""What a store raises, and a remote file whose reads raise it too: a lost connection is no damaged file."""

import errno
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class StoreError(ValueError):
    """A folder or object that cannot be used: one line that says which, why, and what to change."""


class MissingError(StoreError):
    """There is no such object, now."""


class DamagedError(StoreError):
    """A file is there and not whole: reading it again, here or elsewhere, does not help."""


@contextmanager
def full_disk_told(shown: str) -> Iterator[None]:
    """Turn the system's error for a full disk into one line; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(f"{shown}: {error.strerror}: make room, or name another place") from None


class GuardedFile(io.RawIOBase):
    """Reads `stream` inside `guard()`, which turns what the object store raises into the store's own error."""

    def __init__(self, stream: Any, guard: Callable[[], AbstractContextManager[None]]) -> None:
        self._stream, self._guard = stream, guard

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        with self._guard():
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()
