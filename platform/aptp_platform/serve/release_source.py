"""A release on its way to a process that serves it: only the files that the process needs, each checked by its hash."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aptp.release import MANIFEST, BrokenReleaseError, Release, file_sha256, read_release
from aptp_platform.serve.messages import TEACHER, Catalog, ModelFacts, code_name
from aptp_platform.storage.store import StorageConfig, Store

_TEACHER_FOLDER: Final = "pipeline/unet/"


@dataclass(frozen=True)
class ReleaseSource:
    """Where a release is. `cache`: a folder in which a node keeps what it fetched, under the release's hash."""

    uri: str
    storage: StorageConfig = field(default_factory=StorageConfig)
    cache: str | None = None

    def for_router(self) -> Release:
        return self._fetch(lambda name: name.startswith("router/"))

    def for_model(self, name: str) -> Release:
        """The frozen parts of the pipeline, and one code's expert or the teacher."""
        release = self._fetch(lambda _: False)
        names = {code_name(index): f"{code.path}/" for index, code in enumerate(release.codes)}
        unet = names.get(name, _TEACHER_FOLDER)
        return self._fetch(
            lambda file: (
                file.startswith(unet) or (file.startswith("pipeline/") and not file.startswith(_TEACHER_FOLDER))
            )
        )

    def has_teacher(self) -> bool:
        """Whether the full UNet was published too."""
        return any(name.startswith(_TEACHER_FOLDER) for name in self._fetch(lambda _: False).files)

    def catalog(self, *, with_teacher: bool) -> Catalog:
        """What can be served. A release in a local folder is verified as a whole. In a bucket every file must be there,
        and each process verifies what it fetches.

        Raises:
            ValueError: no whole release is there, a file is not what its hash says, or the teacher is not in it.
        """
        store = Store.open(self.uri, self.storage)
        if store.is_local:
            read_release(store.uri)
        release = self._fetch(lambda _: False)
        missing = set(release.files) - set(store.list())
        if missing:
            raise BrokenReleaseError(f"{store.uri}/{min(missing)} is missing: publish to a new path")
        models = [
            ModelFacts(code_name(index), code.ratio, code.macs, code.params, code.share)
            for index, code in enumerate(release.codes)
        ]
        if with_teacher:
            if not self.has_teacher():
                raise ValueError(
                    f"teacher: {self.uri} was published without its teacher; set teacher to false, or publish it with "
                    "the teacher"
                )
            models.append(ModelFacts(TEACHER, 1.0, models[0].macs / models[0].ratio, None, None))
        channels = store.read_json("pipeline/vae/config.json")["block_out_channels"]
        height, width = (side * 2 ** (len(channels) - 1) for side in release.info.latent_size)
        digest, familiar = file_sha256(release.path / MANIFEST)[:12], release.info.training.get("familiar")
        return Catalog(digest, (width, height), tuple(models), familiar)

    def _fetch(self, wanted: Callable[[str], bool]) -> Release:
        """The release with at least the wanted files in place and verified."""
        store = Store.open(self.uri, self.storage)
        folder = Path(store.uri) if store.is_local else self._download(store, wanted)
        release = read_release(folder, verify=False)
        files = {name: digest for name, digest in release.files.items() if wanted(name)}
        damaged = _damaged(folder, files)
        if damaged and not store.is_local:
            with _locked(folder):
                for part in _parts(damaged):
                    store.fetch(part, (folder / part).parent)
            damaged = _damaged(folder, {name: files[name] for name in damaged})
        if damaged:
            raise BrokenReleaseError(
                f"{store.uri}/{damaged[0]} is missing or not what was published: publish to a new path"
            )
        return release

    def _download(self, store: Store, wanted: Callable[[str], bool]) -> Path:
        root = Path(self.cache or Path(tempfile.gettempdir()) / "aptp-releases")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            manifest = store.fetch(MANIFEST, scratch)
            folder = root / file_sha256(manifest)
            with _locked(folder):  # replicas of one node share what one of them fetches
                folder.mkdir(exist_ok=True)
                manifest.replace(folder / MANIFEST)
                files = read_release(folder, verify=False).files
                for part in _parts(name for name in files if wanted(name)):
                    if not (folder / part).exists():
                        (folder / part).parent.mkdir(exist_ok=True)
                        store.fetch(part, (folder / part).parent)
        return folder


def _parts(names: Iterable[str]) -> list[str]:
    """The folders that are fetched as a whole: `experts/03`, `pipeline/vae`."""
    return sorted({"/".join(name.split("/")[:2]) for name in names})


def _damaged(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The files that are not there or not what their hash says."""
    return [
        name for name, sha256 in files.items() if not (folder / name).is_file() or file_sha256(folder / name) != sha256
    ]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
