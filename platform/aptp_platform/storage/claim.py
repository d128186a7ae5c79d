"""A small JSON file that one process makes, and changes only as long as it is as it was read: by the store's own means.

On a disk O_EXCL makes it. To take over one that was left, it is renamed first: only one process can. In an S3 bucket
both are conditions of the request, `If-None-Match: *` and `If-Match`. A server that does not know them ignores them;
`Claim.is_exclusive` finds out.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aptp_platform.storage.errors import MissingError, StoreError
from aptp_platform.storage.store import Store

_NOT_AS_READ = (409, 412)  # a conflict with another request; a condition that does not hold
_NOT_KNOWN = 501


@dataclass(frozen=True)
class Found:
    """What a claim's file held when it was read; the version changes whenever somebody writes or renews it."""

    facts: dict[str, Any]
    version: str


class Claim:
    """The file `name` in `store`."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._path = Path(store.uri, name)

    def read(self) -> Found | None:
        """None if there is no such file."""
        try:
            if self._store.is_local:
                with self._store.open_file(self._name) as stream:
                    data, version = stream.read(), str(os.fstat(stream.fileno()).st_mtime_ns)
            else:
                version = self._store.version(self._name)  # before the data: a condition on it can only be too strict
                data = self._store.read_bytes(self._name)
        except MissingError:
            return None
        try:
            facts = json.loads(data)
        except ValueError:  # its maker has not written it yet, or was killed before
            facts = {}
        return Found(facts if isinstance(facts, dict) else {}, version)

    def make(self, facts: dict[str, Any]) -> bool:
        """Write the file if there is none; whether it was written."""
        if not self._store.is_local:  # looked at first: a server that knows no conditions would overwrite it
            return self.read() is None and self._put(facts, {"IfNoneMatch": "*"})
        with self._store.translated(self._name):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(_bytes(facts))
            except OSError:
                self._path.unlink(missing_ok=True)
                raise
        return True

    def change(self, before: Found, facts: dict[str, Any]) -> bool:
        """Write the file if it is still what was read; whether it was written."""
        if not self._store.is_local:
            return self._put(facts, {"IfMatch": before.version})
        taken = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        with self._store.translated(self._name):
            try:
                self._path.rename(taken)
            except FileNotFoundError:
                return False
            try:
                if str(taken.stat().st_mtime_ns) == before.version:
                    return self.make(facts)
                self._put_back(taken)
                return False
            finally:
                taken.unlink(missing_ok=True)

    def renew(self, before: Found, facts: dict[str, Any]) -> None:
        """Let others see that its owner lives. On a disk this takes no room, so a full one does not hinder it."""
        if not self._store.is_local:
            self._put(facts, {"IfMatch": before.version})
            return
        with self._store.translated(self._name):
            os.utime(self._path)

    def is_exclusive(self, facts: dict[str, Any]) -> bool:
        """Whether the store refuses to make the file, which this process has made, once more."""
        return (
            self._store.is_local or self._store.put_if(self._name, _bytes(facts), {"IfNoneMatch": "*"}) in _NOT_AS_READ
        )

    def remove(self) -> None:
        self._store.remove(self._name)

    def _put(self, facts: dict[str, Any], condition: dict[str, str]) -> bool:
        """Write the object under a condition, or under none where the server knows no conditions."""
        status = self._store.put_if(self._name, _bytes(facts), condition)
        if status == _NOT_KNOWN:
            status = self._store.put_if(self._name, _bytes(facts), {})
        if status in _NOT_AS_READ:  # also if an earlier attempt was written, and its answer lost
            return (found := self.read()) is not None and found.facts == facts
        if status is not None:
            raise StoreError(f"{self._store.uri}/{self._name}: the store answers {status} to a write")
        return True

    def _put_back(self, taken: Path) -> None:
        """What was renamed is somebody's new file: it gets its name back, unless there is another one by now."""
        try:
            os.link(taken, self._path)
        except FileExistsError:
            return


def _bytes(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts) + "\n").encode()
