"""Who works on a run: one file beside it, which its owner changes again and again while it lives.

No clock is compared: a lease is alive if it changes while another run looks at it. One that stays as it is was left by
a run that died, and is taken over. Two that take it at the same moment both wait and read it again: the last to write
has it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from aptp_platform.storage.errors import MissingError, StoreError
from aptp_platform.storage.store import Store

BEAT_SECONDS = 5.0
DEAD_SECONDS = 20.0


class LeaseError(ValueError):
    """The run belongs to another process: one line that says which and what to do."""


class Lease:
    """Held in a `with` block; `require` says in it whether it is still held.

    Args:
        store: the run's folder.
        name: what is worked on in it, such as a stage.
        beat_s: how often the owner changes the file.
        dead_s: a file unchanged for so long has no owner any more.
    """

    def __init__(self, store: Store, name: str, beat_s: float = BEAT_SECONDS, dead_s: float = DEAD_SECONDS) -> None:
        self._store, self._file, self._what = store, f"leases/{name}.json", f"{store.uri}: {name}"
        self._beat_s, self._dead_s = beat_s, dead_s
        self._own = uuid.uuid4().hex
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)

    def __enter__(self) -> Lease:
        """Raises LeaseError if another run holds it and lives."""
        before = self._read()
        if before is not None:
            deadline = time.monotonic() + self._dead_s
            while time.monotonic() < deadline:
                time.sleep(self._beat_s / 4)
                now = self._read()
                if now is None:
                    break
                if now != before:
                    raise self._taken(now)
        self._write()
        if before is not None:  # somebody else may have waited for the same end
            time.sleep(self._beat_s)
            self.require()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            found = self._read()
            if found is not None and found["id"] == self._own:
                self._store.remove(self._file)
        except StoreError:
            if error is None:
                raise

    def require(self) -> None:
        """LeaseError if another run has taken the lease over meanwhile: what this one publishes would mix with it."""
        found = self._read()
        if found is None or found["id"] != self._own:
            raise self._taken(found or {})

    def _taken(self, found: dict[str, Any]) -> LeaseError:
        return LeaseError(
            f"{self._what}: another run works on it (process {found.get('process', '?')} on {found.get('host', '?')}): "
            "wait for it, end it, or give this run a root of its own"
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            return self._store.read_json(self._file)
        except MissingError:
            return None

    def _write(self) -> None:
        self._beats += 1
        facts = {"id": self._own, "beats": self._beats, "host": socket.gethostname(), "process": os.getpid()}
        self._store.write_json(self._file, facts)

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                found = self._read()
                if found is None or found["id"] != self._own:
                    return  # lost; `require` will say so
                self._write()
            except StoreError:
                continue  # the bucket is away: for others too
