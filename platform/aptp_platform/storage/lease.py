"""A lease on a run: one file in it, which its owner rewrites every few seconds while it lives.

No clocks are compared: a lease is alive if it changes while another run watches it. One that does not change was left
by a run that died, and is taken over. Two runs that take over such a lease at the same moment both wait and read it
again: the last to write has it.
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
    """Held in a `with` block; in it, `require` checks that it is still held.

    Args:
        store: the run's folder.
        name: what is worked on in it, such as a stage.
        beat_s: how often the owner changes the file.
        dead_s: after this long without a change the file's owner counts as dead.
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
        if before is not None:  # another run may have waited for the same lease
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
        """LeaseError if another run has taken over the lease: the results of the two would mix."""
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
                continue  # the bucket does not answer, for others neither
