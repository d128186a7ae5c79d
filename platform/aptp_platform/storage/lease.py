"""A lease on a run: one file in it, which its owner renews every few seconds while it lives.

Only one process can make the file, or take over one that was left (`claim`). No clocks are compared: a lease is alive
if it changes while another run watches it. One that does not was left by a run that died; if that was a process of this
machine, it is known at once. A run that finds its lease taken over ends: the results of the two would mix.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from aptp_platform.storage.claim import Claim, Found
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import Store

BEAT_SECONDS = 5.0
DEAD_SECONDS = 20.0
GRACE_SECONDS = 30.0  # from a lost lease to the end of its process
_GONE_SECONDS = 0.5  # while another run looks at the file, it has no name for a moment


class LeaseError(ValueError):
    """The run belongs to another process: one line that says which and what to do."""


class Lease:
    """Held in a `with` block, which ends with a LeaseError as soon as it is not held any more; `require` checks it.

    Args:
        store: the run's folder.
        name: what is worked on in it, such as a stage.
        beat_s: how often the owner changes the file.
        dead_s: after this long without a change the file's owner counts as dead.
        grace_s: how long a block may take to end after its lease was lost; then its process is ended.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        beat_s: float = BEAT_SECONDS,
        dead_s: float = DEAD_SECONDS,
        grace_s: float = GRACE_SECONDS,
    ) -> None:
        self._what, self._claim = f"{store.uri}: {name}", Claim(store, f"leases/{name}.json")
        self._beat_s, self._dead_s, self._grace_s = beat_s, dead_s, grace_s
        self._own = uuid.uuid4().hex
        self._beats = 0
        self._ended = threading.Event()
        self._lost: LeaseError | None = None
        self._thread = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)
        self._holder = threading.get_ident()

    def __enter__(self) -> Lease:
        """Raises LeaseError if another run holds it and lives."""
        self._holder = threading.get_ident()
        if not self._claim.make(self._facts()):
            self._take_over()
        if not self._claim.is_exclusive(self._facts()):
            print(
                f"warning: {self._what}: this store ignores If-None-Match, so two jobs that start within "
                f"{self._beat_s:g} s can both go on; start one at a time",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(self._beat_s)
            self.require()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._lost is not None:
            raise self._lost from error
        try:
            if self._holds(self._claim.read()):
                self._claim.remove()
        except StoreError:
            if error is None:
                raise

    def require(self) -> None:
        """LeaseError if another run has taken over the lease: the results of the two would mix."""
        found = self._read()
        if not self._holds(found):
            raise self._taken(found)

    def _take_over(self) -> None:
        """Watch the file, and take it if its owner is dead."""
        before, deadline = self._claim.read(), time.monotonic() + self._dead_s
        while before is not None and not _is_dead(before.facts) and time.monotonic() < deadline:
            time.sleep(self._beat_s / 4)
            now = self._claim.read()
            if now is None:
                before = None
            elif now != before:
                raise self._taken(now)
        taken = self._claim.make(self._facts()) if before is None else self._claim.change(before, self._facts())
        if not taken:
            raise self._taken(self._claim.read())

    def _taken(self, found: Found | None) -> LeaseError:
        facts = {} if found is None else found.facts
        return LeaseError(
            f"{self._what}: another run works on it (process {facts.get('process', '?')} on {facts.get('host', '?')}): "
            "wait for it, end it, or give this run a root of its own"
        )

    def _holds(self, found: Found | None) -> bool:
        return found is not None and found.facts.get("id") == self._own

    def _read(self) -> Found | None:
        found = self._claim.read()
        if found is None:
            time.sleep(_GONE_SECONDS)
            found = self._claim.read()
        return found

    def _facts(self) -> dict[str, Any]:
        own = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}
        return {"id": self._own, "beats": self._beats, **own, "machine": _machine()}

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                found = self._read()
                if found is None or not self._holds(found):
                    self._lose(found)
                    return
                self._beats += 1
                self._claim.renew(found, self._facts())
            except (StoreError, OSError):
                continue  # the store does not answer, for others neither

    def _lose(self, found: Found | None) -> None:
        """End the block from this thread: by an interrupt, and if that is not heard, by ending the process."""
        if self._ended.is_set():
            return
        self._lost = self._taken(found)
        # A process that was started in the background may ignore interrupts.
        heard = callable(signal.getsignal(signal.SIGINT))
        if heard and self._holder == threading.main_thread().ident:
            _thread.interrupt_main()
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._holder), ctypes.py_object(LeaseError))
        if not self._ended.wait(self._grace_s):
            print(f"error: {self._lost}", file=sys.stderr, flush=True)
            os._exit(2)


def _is_dead(facts: dict[str, Any]) -> bool:
    """Whether the owner is known to have ended: its process was one of this machine."""
    if not facts.get("started") or facts.get("machine") != _machine():
        return False
    return _started(facts["process"]) != facts["started"]


def _machine() -> str:
    """The system that process numbers belong to: its boot, and the container's name space. "" if it does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process started, in ticks since the boot; "" if there is none, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
