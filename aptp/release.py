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
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import aptp.router

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


def write_release(
    path: Path | str,
    *,
    pipeline: Path | str,
    router: "aptp.router.Router",
    experts: Sequence[Path | str],
    shares: Sequence[float],
    info: ReleaseInfo,
    report: Path | str | None = None,
    with_teacher: bool = False,
) -> Release:
    """Publishes a release at a new local path and returns it, verified.

    pipeline: the base model's diffusers folder. experts: K folders written by `save_expert`, in the order of the
    router's codes. shares: each code's share of the training prompts, positive, summing to 1.
    """
    from aptp.expert import read_expert_info  # torch, which the reader of a release does without

    target = Path(path)
    if target.exists():
        raise ValueError(f"{target} exists already, and releases do not change: publish to a new path")
    _check(router, experts, shares, Path(pipeline))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        left_out = None if with_teacher else shutil.ignore_patterns("unet", "safety_checker", "feature_extractor")
        shutil.copytree(pipeline, staging / "pipeline", ignore=left_out)
        router.save(staging / "router")
        codes = []
        for index, (folder, share) in enumerate(zip(experts, shares, strict=True)):
            name = f"experts/{index:02d}"
            shutil.copytree(folder, staging / name)
            expert = read_expert_info(staging / name)
            codes.append(ReleasedCode(name, expert.cost.macs, expert.cost.ratio, expert.cost.params, float(share)))
        if report is not None:
            shutil.copytree(report, staging / "report")
        manifest = {
            "schema": SCHEMA,
            "num_codes": len(codes),
            "info": asdict(info),
            "codes": [asdict(code) for code in codes],
            "files": {name: file_sha256(staging / name) for name in files_below(staging)},
        }
        partial = staging / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(manifest, indent=1, sort_keys=True))
        partial.rename(staging / MANIFEST)
        staging.chmod(0o755)
        staging.rename(target)  # fails, atomically, where another release appeared meanwhile
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return read_release(target)


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


def _check(
    router: "aptp.router.Router", experts: Sequence[Path | str], shares: Sequence[float], pipeline: Path
) -> None:
    if not len(experts) == len(shares) == router.num_codes:
        raise ValueError(
            f"a release needs one expert and one share for each code: there are {router.num_codes} codes, "
            f"{len(experts)} experts and {len(shares)} shares"
        )
    if router.encoder is None:
        raise ValueError("the router has no prompt encoder: a release must be able to route prompts, give it one")
    unused = [index for index, share in enumerate(shares) if share <= 0]
    if unused or abs(sum(shares) - 1) > 1e-3:
        raise ValueError(f"shares must be positive and sum to 1, they are {list(shares)} (codes {unused} unused)")
    if not (pipeline / "model_index.json").is_file():
        raise ValueError(f"{pipeline} holds no model_index.json: it must be a diffusers pipeline folder")
