"""Writes a release: the base pipeline, the router and its experts into one new folder, whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from aptp.expert import read_expert_info
from aptp.release import MANIFEST, SCHEMA, Release, ReleasedCode, ReleaseInfo, file_sha256, files_below, read_release
from aptp.router import Router


def write_release(
    path: Path | str,
    *,
    pipeline: Path | str,
    router: Router,
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


def _check(router: Router, experts: Sequence[Path | str], shares: Sequence[float], pipeline: Path) -> None:
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
