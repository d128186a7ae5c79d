"""The files below a folder whose names match a glob: name, size, version.

Whatever cannot be listed raises, at any depth: an empty answer means that there is nothing. (fsspec's own `find` leaves
out what it cannot read: always on a disk, and in a bucket as soon as it is given a depth.)
"""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FileInfo:
    """A file as it is now. version: a bucket's ETag, or the time of the last change."""

    size: int
    version: str


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a glob; `*` and `?` stop at `/`, a leading `**` takes all depths."""
    parts, wanted = name.split("/"), pattern.split("/")
    if wanted[0] == "**":
        wanted = wanted[1:] or ["*"]
        parts = parts[len(parts) - len(wanted) :]
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def files_on_disk(root: str, patterns: Sequence[str]) -> dict[str, FileInfo]:
    """By name; an absent folder has none. Links are followed, except to a folder that holds them."""
    found: dict[str, FileInfo] = {}
    left = [""]
    while left:
        folder = left.pop()
        try:
            with os.scandir(f"{root}/{folder}") as scanned:
                entries = list(scanned)
        except (FileNotFoundError, NotADirectoryError):
            continue  # there is no such folder, or it has gone meanwhile
        for entry in entries:
            name = folder + entry.name
            if entry.is_dir():
                if _may_hold(name, patterns) and not _is_a_loop(entry):
                    left.append(f"{name}/")
            elif any(matches(name, pattern) for pattern in patterns):
                try:
                    facts = entry.stat()
                except FileNotFoundError:
                    if entry.is_symlink():  # reading it says that it leads nowhere; left out, nobody would know
                        found[name] = FileInfo(0, "a link to nothing")
                    continue
                found[name] = FileInfo(facts.st_size, str(facts.st_mtime_ns))
    return found


def files_in_bucket(filesystem: Any, root: str, patterns: Sequence[str]) -> dict[str, FileInfo]:
    """By name; an absent bucket or prefix has none. filesystem: fsspec's."""
    found: dict[str, FileInfo] = {}
    for key, info in _objects(filesystem, root, patterns):
        name = key[len(root) :].lstrip("/")
        if name and not name.endswith("/") and any(matches(name, pattern) for pattern in patterns):
            version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("updated") or ""
            found[name] = FileInfo(int(info["size"]), str(version))
    return found


def _objects(filesystem: Any, root: str, patterns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        if any("**" in pattern for pattern in patterns):
            yield from filesystem.find(root, detail=True).items()
            return
        left = [root]
        while left:
            for info in filesystem.ls(left.pop(), detail=True):
                key = info["name"].rstrip("/")
                if info["type"] != "directory":
                    yield info["name"], info
                elif len(key) > len(root) and _may_hold(key[len(root) :].lstrip("/"), patterns):
                    left.append(key)
    except FileNotFoundError:
        return


def _may_hold(folder: str, patterns: Sequence[str]) -> bool:
    """Whether a name below this folder can match."""
    parts = folder.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if "**" in wanted:
            return True
        if len(wanted) > len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            return True
    return False


def _is_a_loop(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return False
    target, here = Path(entry.path).resolve(), Path(entry.path).parent.resolve()
    return target == here or target in here.parents
