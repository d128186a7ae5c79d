"""Folders and objects, wherever they are: a path, `file://`, `s3://` or `gs://`, by fsspec.

A `Store` is one folder. Writes are atomic: readers see complete files only, and a published folder's marker
(`release.json`) appears last. Credentials come from the environment or from a profile; they never appear
in a config, a URI, a pickled `Store` or an error. The module is light: a task that only reads does not load torch.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow.fs
from pydantic import Field

from aptp_platform.storage.errors import GuardedFile, StoreError, full_disk_told
from aptp_platform.storage.refusals import one_line
from aptp_platform.storage.s3 import PatientS3, status_of
from aptp_platform.storage.walk import FileInfo, files_in_bucket, files_on_disk

MARKERS = ("release.json",)
_SCHEMES = ("s3", "gs")
_CONNECT_SECONDS = 5
_BUFFER = 1 << 20


@dataclass(frozen=True)
class StorageConfig:
    """How object stores are reached. Keys and tokens come from the environment or a profile, never from here."""

    endpoint: str | None = None  # of an S3-compatible server; unset: the provider's own
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    timeout_s: Annotated[float, Field(gt=0)] = 15.0  # a request without a byte of response for this long has failed
    attempts: Annotated[int, Field(ge=1)] = (
        10  # per request, with pauses that grow to 20 s: enough for an outage of 55 s
    )


@dataclass(frozen=True)
class Store:
    """One folder, local or in a bucket. Names in it are relative, with `/`; `""` is the folder itself."""

    uri: str  # a local folder's absolute path, or scheme://bucket/prefix
    config: StorageConfig = field(default_factory=StorageConfig)

    @classmethod
    def open(cls, uri: str | Path, config: StorageConfig | None = None) -> Store:
        """The folder at `uri`; a relative path is made absolute. Nothing is touched yet.

        Raises:
            StoreError: an unknown scheme, no bucket, or credentials or options written into the URI.
        """
        text = str(uri)
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls(str(Path(text).expanduser().absolute()), config or StorageConfig())
        if scheme == "file":
            return cls(str(Path(unquote(urlsplit(text).path)).absolute()), config or StorageConfig())
        if scheme not in _SCHEMES:
            raise StoreError(f"{scheme}://...: unknown scheme; use a path, file://, {'://, '.join(_SCHEMES)}://")
        bucket = rest.partition("/")[0]
        if "@" in bucket or "?" in rest:
            raise StoreError(
                f"{scheme}://...: a URI holds a bucket and a prefix only; endpoint and region belong in `storage:`, "
                "keys in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or in a profile (storage.profile)"
            )
        if not bucket:
            raise StoreError(f"{text}: names no bucket; write {scheme}://bucket/prefix")
        return cls(text.rstrip("/"), config or StorageConfig())

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def join(self, *parts: str) -> Store:
        """A folder in this one."""
        return Store("/".join([self.uri.rstrip("/"), *(part.strip("/") for part in parts if part)]), self.config)

    def reach(self) -> None:
        """Ask the bucket for this folder once, without retries.

        Raises:
            StoreError: it is not reachable, or refuses to list.
        """
        Store(self.uri, replace(self.config, attempts=1)).exists()

    def make(self) -> None:
        """Create the bucket, or the local folder, if it is missing."""
        with self.translated(""):
            self._fs.makedirs(self._path(""), exist_ok=True)

    def exists(self, name: str = "") -> bool:
        """Whether the file or folder is there; a bucket that is missing holds nothing."""
        with self.translated(name):
            try:
                self._fs.info(self._path(name))
            except FileNotFoundError:
                return False
            return True

    def list(self, pattern: str = "**") -> builtins.list[str]:
        """Names of the files here that match a glob, sorted; `*` and `?` stop at `/`, a leading `**` takes all depths.

        An absent folder has no files.
        """
        return sorted(self.files(pattern))

    def files(self, *patterns: str) -> dict[str, FileInfo]:
        """As `list`, with sizes and versions, for several globs in one listing.

        Raises:
            StoreError: the folder, or one in it that may hold a match, cannot be listed.
        """
        path = self._path("")
        with self.translated(""):
            if self.is_local:
                return files_on_disk(path, patterns)
            return files_in_bucket(self._fs, path, patterns)

    def require(self, pattern: str, fix: str) -> builtins.list[str]:
        """As `list`, but at least one.

        Args:
            fix: what to change, named in the error: a config field.

        Raises:
            StoreError: the folder is missing or empty, or nothing in it matches.
        """
        found = self.list(pattern)
        if found:
            return found
        there = self.list("*")
        if there:
            some = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
            raise StoreError(f"{self.uri}: no file matches {pattern!r}; it holds {some}: change {fix}")
        state = "holds no files" if self.exists() else "does not exist"
        raise StoreError(f"{self.uri}: {state}; it must hold files that match {pattern!r}: change {fix}")

    def fingerprint(self, pattern: str = "**") -> str:
        """A sha256 over the names, sizes and versions (ETag, or time of change) of the files that match."""
        return fingerprint_of(self.files(pattern))

    @contextmanager
    def open_file(self, name: str, mode: Literal["rb", "wb"] = "rb") -> Iterator[IO[bytes]]:
        """A file as a stream. A written one appears when the block ends without an error, and not at all otherwise."""
        if mode == "rb":
            with self.translated(name):
                stream = self._fs.open(self._path(name), "rb")
            if not self.is_local:
                stream = io.BufferedReader(GuardedFile(stream, lambda: self.translated(name)), _BUFFER)
            with stream:
                yield stream
            return
        target = Path(self._path(name))
        folder = target.parent if self.is_local else Path(tempfile.gettempdir())
        scratch = folder / f".{target.name}.{uuid.uuid4().hex}"
        try:
            with self.translated(name):
                folder.mkdir(parents=True, exist_ok=True)
                stream = scratch.open("wb")
            with full_disk_told(self._show(name)), stream:
                yield stream
            with self.translated(name):
                if self.is_local:
                    scratch.replace(target)
                else:
                    self._fs.put_file(str(scratch), self._path(name))
        finally:
            scratch.unlink(missing_ok=True)

    def read_bytes(self, name: str) -> bytes:
        with self.translated(name):
            return self._fs.cat_file(self._path(name))  # one request: an open file fails if it is replaced meanwhile

    def read_json(self, name: str) -> Any:
        data = self.read_bytes(name)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(f"{self._show(name)}: is not JSON: {error}; write it again") from None

    def write_json(self, name: str, value: Any) -> None:
        with self.open_file(name, "wb") as stream:
            stream.write((json.dumps(value, indent=2) + "\n").encode())

    def version(self, name: str) -> str:
        """An object's ETag or time of change."""
        with self.translated(name):
            info = self._fs.info(self._path(name))
        return str(info.get("ETag") or info.get("etag") or info.get("mtime") or "")

    def put_if(self, name: str, data: bytes, condition: Mapping[str, str]) -> int | None:
        """Write an object under a condition of S3's (`IfNoneMatch`, `IfMatch`); the status, if the server refuses it.

        Google's buckets know such conditions by other names: there, none is asked for.
        """
        with self.translated(name):
            if not self.uri.startswith("s3://"):
                self._fs.pipe_file(self._path(name), data)
                return None
            bucket, _, key = self._path(name).partition("/")
            try:
                self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            except OSError as error:
                status = status_of(error)
                if condition and status in (409, 412, 501):
                    return status
                raise
        return None

    def fetch(self, name: str, local_dir: str | Path) -> Path:
        """A local copy of a file or folder: where it is, if it is local, else in `local_dir` under its last name."""
        if self.is_local:
            if not self.exists(name):
                raise StoreError(f"{self._show(name)}: does not exist; check the path")
            return Path(self._path(name))
        target = Path(local_dir) / PurePosixPath(self._path(name)).name
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        path = self._path(name)
        try:
            with self.translated(name):
                files = self._fs.find(path)
                if not files:
                    raise FileNotFoundError(path)
                targets = [str(scratch / file[len(path) :].strip("/")).rstrip("/") for file in files]
                for each in targets:
                    Path(each).parent.mkdir(parents=True, exist_ok=True)
                self._fs.get(files, targets)
            if target.is_dir():
                shutil.rmtree(target)
            scratch.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    def publish(self, local_dir: str | Path, name: str, *, last: Sequence[str] = MARKERS) -> None:
        """Copy a local folder here as `name`, in the place of what was there.

        Locally the whole folder appears at once. In a bucket the files named in `last` are removed first and written
        last, so a reader that finds one of them finds a whole folder.
        """
        source = Path(local_dir)
        if not source.is_dir():
            raise StoreError(f"{source}: is no folder; there is nothing to publish as {self._show(name)}")
        if self.is_local:
            target = Path(self._path(name))
            if target == source.absolute():
                return
            scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                with self.translated(name):
                    shutil.copytree(source, scratch)
                    _put_in_place(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            return
        self.remove(name)
        files = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        with self.translated(name):
            for group in ([file for file in files if file not in last], [file for file in files if file in last]):
                self._fs.put([str(source / file) for file in group], [self._path(f"{name}/{file}") for file in group])

    def move(self, name: str, target: str, *, keep: bool = False) -> None:
        """Rename a folder in this store, in the place of what was there; in a bucket, object by object.

        Args:
            keep: in a bucket, what the target holds stays; so a move that was interrupted can be finished.
        """
        if self.is_local:
            with self.translated(name):
                _put_in_place(Path(self._path(name)), Path(self._path(target)))
            return
        if not keep:
            self.remove(target)
        files = self.join(name).list()
        with self.translated(name):
            sources = [self._path(f"{name}/{file}") for file in files]
            self._fs.copy(sources, [self._path(f"{target}/{file}") for file in files])
            self._fs.rm(sources)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all it holds; nothing happens when it is not there. Markers go first."""
        if not name.strip("/."):
            raise StoreError(f"{self.uri}: will not remove the folder itself; name a part of it")
        with self.translated(name):
            path = self._path(name)
            for marker in MARKERS:
                if self._fs.exists(f"{path}/{marker}"):
                    self._fs.rm(f"{path}/{marker}")
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """This folder for Arrow, Ray Data and Ray Train's storage: a file system, and the path in it."""
        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.uri
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self._fs)), self._path("")

    @property
    def _fs(self) -> Any:
        """fsspec keeps one instance for the same arguments in a process."""
        if self.is_local:
            return fsspec.filesystem("file", auto_mkdir=True, use_listings_cache=False)
        config = self.config
        if self.uri.startswith("gs://"):
            try:
                return fsspec.filesystem("gs", token="anon" if config.anonymous else None, use_listings_cache=False)
            except ImportError:
                raise StoreError(f"{self.uri}: gs:// needs the package gcsfs: pip install 'aptp[gcs]'") from None
        with self.translated(""):
            return PatientS3(
                attempts=config.attempts,
                anon=config.anonymous,
                endpoint_url=config.endpoint,
                profile=config.profile,
                client_kwargs={"region_name": config.region} if config.region else {},
                config_kwargs={"connect_timeout": _CONNECT_SECONDS, "read_timeout": config.timeout_s},
                use_listings_cache=False,
            )

    def _path(self, name: str) -> str:
        folder = self.uri.partition("://")[2] or self.uri
        return f"{folder}/{name.strip('/')}".rstrip("/") or "/"

    def _show(self, name: str) -> str:
        return f"{self.uri}/{name}" if name else self.uri

    def translated(self, name: str) -> AbstractContextManager[None]:
        """In this block what fsspec and botocore raise becomes a `StoreError`."""
        config = None if self.is_local else self.config
        endpoint, profile = (config.endpoint, config.profile) if config else (None, None)
        return one_line(self._show(name), self.is_local, endpoint, profile, lambda: self._fs.why(self._path(name)))


def _put_in_place(source: Path, target: Path) -> None:
    """Rename a folder over another one; the old one is removed only after the new one is in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    if target.exists():
        target.rename(old)
    source.rename(target)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def fingerprint_of(files: Mapping[str, FileInfo]) -> str:
    """A sha256 over names, sizes and versions."""
    digest = hashlib.sha256()
    for name, info in sorted(files.items()):
        digest.update(json.dumps([name, info.size, info.version]).encode())
    return digest.hexdigest()
