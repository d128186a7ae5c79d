# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from aptp.cost import cost_table
from aptp.expert import BaseModel, save_expert
from aptp.release import BrokenReleaseError, ReleaseInfo, file_sha256, read_release, write_release
from aptp.slicing import slice_unet
from tests.support.tiny_pipeline import NUM_TOKENS, build_pipeline
from tests.support.tiny_release import build_router


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A release's folder and the arguments it was written from."""
    work = tmp_path_factory.mktemp("release")
    pipeline = build_pipeline()
    pipeline.save_pretrained(work / "pipeline")
    router = build_router(pipeline.unet, num_codes=2)
    base = BaseModel.of(pipeline.unet, "tiny")
    table = cost_table(pipeline.unet, router.space, (8, 8), NUM_TOKENS)
    experts = []
    for index, code in enumerate(router.architecture_codes()):
        experts.append(work / f"expert-{index}")
        save_expert(experts[-1], slice_unet(pipeline.unet, code), code, base=base, cost=table)
    parts = {
        "pipeline": work / "pipeline",
        "router": router,
        "experts": experts,
        "shares": [0.5, 0.5],
        "info": ReleaseInfo(base.name, base.sha256, 0.6, (8, 8), NUM_TOKENS, {"commit": "none"}),
    }
    write_release(work / "release", **parts)
    return work / "release", parts


@pytest.fixture
def copy(written, tmp_path) -> Path:
    """The release at another path, for breaking."""
    return Path(shutil.copytree(written[0], tmp_path / "copy"))


def test_a_release_says_what_it_is(written):
    path, parts = written
    release = read_release(path)
    assert release.num_codes == 2
    assert release.info == parts["info"]
    assert release.codes[1].path == "experts/01"
    assert [code.share for code in release.codes] == [0.5, 0.5]
    for index, code in enumerate(release.codes):
        assert 0 < code.ratio < 1
        assert code.macs > 0
        assert code.params > 0
        assert (release.expert_path(index) / "code.json").is_file()
    assert release.ratio == pytest.approx(sum(code.ratio for code in release.codes) / 2)
    assert release.teacher_path is None


def test_it_names_the_hash_of_every_file_and_holds_no_pickle(written):
    path, _ = written
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {"release.json"}
    manifest = json.loads((path / "release.json").read_text())
    assert set(manifest["files"]) == files
    assert all(file_sha256(path / name) == digest for name, digest in manifest["files"].items())
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    assert not (path / "pipeline/unet").exists()


def test_the_teacher_and_a_report_may_come_along(written, tmp_path):
    report = tmp_path / "report"
    report.mkdir()
    (report / "metrics.json").write_text("{}")
    release = write_release(tmp_path / "release", **written[1], report=report, with_teacher=True)
    assert (release.teacher_path / "diffusion_pytorch_model.safetensors").is_file()
    assert "report/metrics.json" in release.files


def break_missing(path: Path) -> str:
    (path / "router/router.safetensors").unlink()
    return r"router\.safetensors is missing"


def break_bytes(path: Path) -> str:
    file = path / "experts/00/code.json"
    file.write_text(file.read_text() + " ")
    return r"experts/00/code\.json is not the file that was published"


def break_stranger(path: Path) -> str:
    (path / "experts/note.txt").write_text("hello")
    return r"note\.txt does not belong"


def break_schema(path: Path) -> str:
    manifest = json.loads((path / "release.json").read_text())
    (path / "release.json").write_text(json.dumps(manifest | {"schema": 99}))
    return "has schema 99, this version reads schema 1"


def break_manifest(path: Path) -> str:
    (path / "release.json").write_text("{")
    return "is not JSON"


def break_absent(path: Path) -> str:
    (path / "release.json").unlink()
    return r"holds no release\.json"


@pytest.mark.parametrize(
    "damage", [break_missing, break_bytes, break_stranger, break_schema, break_manifest, break_absent]
)
def test_a_damaged_release_is_refused_by_name(copy, damage):
    words = damage(copy)
    with pytest.raises(BrokenReleaseError, match=words):
        read_release(copy)


def test_a_release_is_never_overwritten(written):
    path, parts = written
    before = file_sha256(path / "release.json")
    with pytest.raises(ValueError, match="releases do not change"):
        write_release(path, **parts)
    assert file_sha256(path / "release.json") == before


def test_a_failed_publication_leaves_nothing_behind(written, tmp_path):
    broken = tmp_path / "no-expert"
    broken.mkdir()
    target = tmp_path / "out" / "release"
    with pytest.raises(Exception, match=r"experts/01|no-expert"):
        write_release(target, **written[1] | {"experts": [written[1]["experts"][0], broken]})
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shares": [1.0]}, "one expert and one share for each code"),
        ({"shares": [1.0, 0.0]}, r"codes \[1\] unused"),
        ({"shares": [0.5, 0.6]}, "sum to 1"),
        ({"pipeline": "/nowhere"}, r"holds no model_index\.json"),
    ],
)
def test_parts_that_make_no_release_are_refused(written, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        write_release(tmp_path / "release", **written[1] | change)
