"""The check of the locks, run by uv against an index of three small wheels: `torch` is one of them, as PyPI has it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from install.environment import SetupError, clear, refuse_unsupported, this_python
from install.platforms import ROOT

PYPROJECT = """
[project]
name = "one"
version = "1"
requires-python = ">=3.11,<3.14"
dependencies = ["torch"]
[project.optional-dependencies]
encoders = []
serve = ["numpy<2"]
train = []
[dependency-groups]
dev = []
data = []
bench = []
s3-server = []
[tool.uv]
environments = ["sys_platform == 'linux'"]
no-index = true
find-links = ["index"]
"""
LOCKS = {
    "requirements.lock": "numpy==1.0\ntorch==2.0\n",
    "requirements-cuda.lock": "nvidia-cudnn==9.1\n",
    "requirements-dev.lock": "",
    "requirements-bench.lock": "",
    "requirements-s3.lock": "",
}


def write_wheel(folder: Path, name: str, version: str, *needs: str, python: str = ">=3") -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: {python}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata))
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a project"
    (folder / "index").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    write_wheel(folder / "index", "torch", "2.0", "numpy", 'nvidia-cudnn==9.1; platform_system == "Linux"')
    write_wheel(folder / "index", "nvidia-cudnn", "9.1")
    write_wheel(folder / "index", "numpy", "1.0")
    write_wheel(folder / "index", "numpy", "2.0")
    write_wheel(folder / "index", "numpy", "3.0", python=">=3.12")
    for name, text in LOCKS.items():
        (folder / name).write_text(text)
    return folder


def run(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    nowhere = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    environment = {**os.environ, "UV_CACHE_DIR": str(project / "cache"), **nowhere}
    command = [sys.executable, "-m", "install.lock", "--folder", str(project), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_whole_locks_pass(project: Path) -> None:
    assert run(project, "--check").stdout.startswith("locks: whole for Python 3.11, 3.12, 3.13")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("requirements-cuda.lock", "", "requirements-cuda.lock lacks nvidia-cudnn==9.1"),
        ("requirements.lock", "numpy==2.0\ntorch==2.0\n", "requirements.lock has numpy==2.0, allowed is numpy==1.0"),
        ("requirements-dev.lock", "six==1.0\n", "requirements-dev.lock has six==1.0, which nothing needs"),
        ("pyproject.toml", PYPROJECT.replace("numpy<2", "numpy<1"), "no versions fit pyproject.toml and the index"),
    ],
)
def test_a_lock_that_does_not_fit_fails(project: Path, name: str, text: str, words: str) -> None:
    (project / name).write_text(text)
    answer = run(project, "--check")
    assert answer.returncode == 1
    assert words in answer.stderr


def test_an_index_that_does_not_answer_fails_nothing(project: Path) -> None:
    (project / "pyproject.toml").write_text(PYPROJECT.replace("no-index = true", ""))
    answer = run(project, "--check")
    assert answer.returncode == 0
    assert answer.stdout.startswith("locks: not checked, the index does not answer")


def test_locks_are_written_apart_and_keep_what_is_allowed(project: Path) -> None:
    (project / "pyproject.toml").write_text(PYPROJECT.replace("numpy<2", "numpy"))
    assert run(project, "--keep").returncode == 0
    written = {name: (project / name).read_text().splitlines()[1:] for name in LOCKS}
    assert written == {name: text.splitlines() for name, text in LOCKS.items()}
    assert run(project).returncode == 0
    assert (project / "requirements.lock").read_text().splitlines()[1:] == [
        "numpy==2.0 ; python_version == '3.11'",
        "numpy==3.0 ; python_version == '3.12' or python_version == '3.13'",
        "torch==2.0",
    ]
    assert run(project, "--check").returncode == 0


@pytest.mark.parametrize(
    ("marker", "value"),
    [
        ("python_version", "3.10"),
        ("python_version", "3.14"),
        ("platform_machine", "aarch64"),
        ("platform_system", "Darwin"),
        ("platform_python_implementation", "PyPy"),
    ],
)
def test_setup_says_in_a_line_what_it_does_not_support(marker: str, value: str) -> None:
    refuse_unsupported(this_python())
    with pytest.raises(SetupError, match=rf"this is .*{value}.*; the locks are for CPython 3\.11, 3\.12, 3\.13"):
        refuse_unsupported({**this_python(), marker: value})


def test_in_a_path_with_a_space_the_environment_is_a_link_to_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "a b").mkdir()
    for environment, linked in [(tmp_path / ".venv", False), (tmp_path / "a b" / ".venv", True)]:
        for _ in range(2):
            folder = clear(environment)
            folder.mkdir(exist_ok=True)
            (folder / "pyvenv.cfg").touch(exist_ok=False)
            assert " " not in str(folder)
            assert environment.is_symlink() is linked
            assert (environment / "pyvenv.cfg").exists()
