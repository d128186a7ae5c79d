"""The last stage of training: experts, router, pipeline and report become one immutable release."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import aptp
import aptp_platform
from aptp.expert import read_expert_info
from aptp.prompts import PromptEncoder
from aptp.release import ReleaseInfo, write_release
from aptp_platform.config import RunConfig
from aptp_platform.config_file import to_tree
from aptp_platform.experts.evidence.scores import FILES
from aptp_platform.models import fetch_model, load_pipeline_parts
from aptp_platform.run.layout import EVALUATED, FINETUNED, RELEASE, home, network_of, refitted_router
from aptp_platform.run.path import finished
from aptp_platform.storage.store import Store


def publish(config: RunConfig) -> dict[str, Any]:
    """Publish `release/`, the teacher's UNet included so that a server can show both; release.json appears last."""
    root = Store.open(config.root, config.storage)
    assigned, refitted = (finished(stage, config)["summary"] for stage in ("assign", "refit"))
    with tempfile.TemporaryDirectory() as scratch:
        router = refitted_router(config)
        router.encoder = PromptEncoder.load(fetch_model(config.model.prompt_encoder, config.storage))
        tuned = home(config, "finetune").join(FINETUNED)
        experts = [tuned.fetch(network_of(code), scratch) for code in range(router.num_codes)]
        _write_pipeline(config, Path(scratch) / "pipeline")
        release = write_release(
            Path(scratch) / "release",
            pipeline=Path(scratch) / "pipeline",
            router=router,
            experts=experts,
            shares=refitted["usage"] if "usage" in refitted else assigned["shares"],
            info=_info(config, experts[0], assigned["familiar"]),
            report=_report(root, scratch),
            with_teacher=True,
        )
        root.publish(release.path, RELEASE)
    return {"release": root.join(RELEASE).uri, "codes": release.num_codes, "MACs ratio": round(release.ratio, 3)}


def _report(root: Store, scratch: str) -> Path:
    """What people read of the evaluation; the scores stay in the run."""
    target = Path(scratch) / "report"
    shutil.copytree(root.fetch(EVALUATED, scratch), target, ignore=shutil.ignore_patterns(*FILES))
    return target


def _write_pipeline(config: RunConfig, folder: Path) -> None:
    """The whole model as one stock diffusers folder, including parts that came from elsewhere."""
    load_pipeline_parts(config.model, config.storage).pipeline().save_pretrained(folder)


def _info(config: RunConfig, expert: Path, familiar: float) -> ReleaseInfo:
    known = read_expert_info(expert)
    return ReleaseInfo(
        base=known.base.name,
        base_hash=known.base.sha256,
        budget=config.router.budget,
        latent_size=known.cost.latent_size,
        num_text_tokens=known.cost.num_text_tokens,
        training={
            "config": to_tree(config),
            "commit": _commit(),
            "code": _code_hash(),
            "inputs": finished("encode", config)["fingerprint"],
            "familiar": familiar,
        },
    )


def _code_hash() -> str:
    """One sha256 over the sources of both packages: it identifies the code even without a checkout."""
    digest = hashlib.sha256()
    for package in (aptp, aptp_platform):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _commit() -> str:
    """The commit of this checkout; "unknown" in an uploaded copy of it."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
