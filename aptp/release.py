"""A release in a local folder: what training publishes and serving reads.

    release.json   schema, base model, K, budget, each code's MACs, ratio, parameters, share; files; how it was trained
    pipeline/      a stock diffusers folder, without its UNet unless the teacher is published too
    router/        predictor, codes and prompt encoder
    experts/00/    a sliced UNet and its code.json
    report/        optional: metrics and figures

release.json names the sha256 of every file and is written last, into a folder that is then renamed: who finds a release
finds a whole one. A release never changes; a new one is a new path.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = 1
MANIFEST: Final = "release.json"


@dataclass(frozen=True)
class ReleasedCode:
    """One expert: its folder, MACs, their ratio to the full UNet's, parameters, and share of the training prompts."""

    path: str
    macs: float
    ratio: float
    params: int
    share: float


@dataclass(frozen=True)
class ReleaseInfo:
    """What a release says of its origin.

    base: the base model's name. base_hash: of its UNet's weights. budget: the mean MACs ratio aimed at. latent_size and
    num_text_tokens: what the MACs were counted for. training: resolved config, commit and data fingerprint, as JSON;
    its `familiar` is the least `Router.familiarity` of all but one in a hundred training prompts.
    """

    base: str
    base_hash: str
    budget: float
    latent_size: tuple[int, int]
    num_text_tokens: int = 77
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Release:
    """A verified release. `path` is its folder; `ratio` its share-weighted mean MACs ratio."""

    path: Path
    info: ReleaseInfo
    codes: tuple[ReleasedCode, ...]
    files: Mapping[str, str]

    @property
    def num_codes(self) -> int:
        return len(self.codes)

    @property
    def ratio(self) -> float:
        return sum(code.share * code.ratio for code in self.codes)

    @property
    def pipeline_path(self) -> Path:
        return self.path / "pipeline"

    @property
    def router_path(self) -> Path:
        return self.path / "router"

    @property
    def teacher_path(self) -> Path | None:
        """The full UNet's folder, if it was published too."""
        folder = self.pipeline_path / "unet"
        return folder if folder.is_dir() else None

    def expert_path(self, index: int) -> Path:
        return self.path / self.codes[index].path


class BrokenReleaseError(ValueError):
    """A file of a release is missing, unexpected or not what its hash says."""


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Every file of a folder, by its path in it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_release(path: Path | str, *, verify: bool = True) -> Release:
    """The release of a local folder. `verify` hashes every file; BrokenReleaseError names the first that is wrong."""
    folder = Path(path)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise BrokenReleaseError(f"{folder} holds no {MANIFEST}: it is not a release, or not a whole one")
    try:
        data = json.loads(manifest.read_text())
    except json.JSONDecodeError as error:
        raise BrokenReleaseError(f"{manifest} is not JSON ({error}): publish the release again") from None
    if data.get("schema") != SCHEMA:
        raise BrokenReleaseError(f"{manifest} has schema {data.get('schema')}, this version reads schema {SCHEMA}")
    if verify:
        _verify(folder, data["files"])
    info = ReleaseInfo(**{**data["info"], "latent_size": tuple(data["info"]["latent_size"])})
    return Release(folder, info, tuple(ReleasedCode(**code) for code in data["codes"]), data["files"])


def _verify(folder: Path, files: Mapping[str, str]) -> None:
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise BrokenReleaseError(f"{folder / name} is missing: copy the release again, {MANIFEST} last")
        if file_sha256(folder / name) != digest:
            raise BrokenReleaseError(f"{folder / name} is not the file that was published (its sha256 differs)")
    strangers = set(files_below(folder)) - set(files) - {MANIFEST}
    if strangers:
        raise BrokenReleaseError(
            f"{folder / min(strangers)} does not belong to the release: {MANIFEST} does not name it"
        )
