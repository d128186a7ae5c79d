"""Makes a virtual environment from lock files: PyTorch first, as the build that fits this machine, then all else.

    python3.12 -m install.environment .venv --project requirements.lock requirements-dev.lock

It runs in the bare interpreter that the environment will have, so it needs the standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from install.platforms import PYTHONS, ROOT, markers

CUDA_LOCK = ROOT / "requirements-cuda.lock"
DESCRIBE = """
import importlib.metadata, platform, torch
needs = importlib.metadata.requires("torch") or []
build = "cuda" if any(need.startswith("nvidia-") for need in needs) else "cpu"
print(build, f"Python {platform.python_version()}, torch {torch.__version__} ({build} build)", sep=";", end=";")
print("a GPU is at hand" if torch.cuda.is_available() else "no GPU is at hand")
"""


class SetupError(Exception):
    """One line: what cannot be set up, and what to do."""


def refuse_unsupported(found: dict[str, str]) -> None:
    """Of the markers: what system, machine and Python this is. The locks are for `platforms.py` alone."""
    wanted = markers(found["python_version"])
    names = ("platform_python_implementation", "python_version", "platform_system", "platform_machine")
    if found["python_version"] not in PYTHONS or any(found[name] != wanted[name] for name in names):
        raise SetupError(
            f"this is {' '.join(found[name] for name in names)}; the locks are for CPython {', '.join(PYTHONS)} on "
            "Linux x86_64: give such a Python as `make setup PYTHON=/path/to/python3.12`"
        )


def this_python() -> dict[str, str]:
    return {
        "platform_python_implementation": platform.python_implementation(),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "platform_system": platform.system(),
        "platform_machine": platform.machine(),
    }


def has_nvidia_gpu() -> bool:
    """Asks the driver's own tool; in a container without it, the device files."""
    if any(re.fullmatch(r"nvidia\d+", path.name) for path in Path("/dev").glob("nvidia*")):
        return True
    tool = shutil.which("nvidia-smi")
    return bool(tool) and "GPU 0" in subprocess.run([str(tool), "-L"], capture_output=True, text=True).stdout


def pinned(name: str, locks: list[Path]) -> str | None:
    """The version that the locks give a distribution, or None if they do not name it."""
    found = [re.search(rf"(?m)^{name}==([^\s;]+)", lock.read_text()) for lock in locks]
    return next((match[1] for match in found if match), None)


def python_of(environment: Path) -> str:
    return str(environment / "bin" / "python")


def pip(environment: Path, *arguments: str, quiet: bool = False) -> bool:
    """Whether pip could install this, and nothing else: the locks name what each distribution needs."""
    command = [python_of(environment), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
    run = subprocess.run([*command, *arguments], stderr=subprocess.DEVNULL if quiet else None, check=False)
    return run.returncode == 0


def must_install(environment: Path, *arguments: str) -> None:
    if not pip(environment, *arguments):
        raise SetupError(f"pip could not install {' '.join(arguments)} into {environment}; it says why above")


def install_torch(environment: Path, version: str, wanted: str, cpu_index: str) -> None:
    """wanted: `cuda`, `cpu`, or `auto`, which is `cuda` beside a GPU and else `cpu` where an index offers it."""
    if wanted == "cpu" or (wanted == "auto" and not has_nvidia_gpu()):
        cpu = f"torch=={version}+cpu"
        if pip(environment, cpu, quiet=True):
            return
        if cpu_index and pip(environment, "--retries=0", "--timeout=10", f"--index-url={cpu_index}", cpu, quiet=True):
            return
        if wanted == "cpu":
            raise SetupError(f"no index has {cpu}: name one that has it as TORCH_CPU_INDEX=..., or use TORCH=auto")
        print(f"No index has {cpu}: installing the CUDA build, some 3 GB", flush=True)
    must_install(environment, f"torch==={version}")  # `===` also excludes +cpu, which `==` prefers


def describe(environment: Path) -> tuple[str, str]:
    """cpu or cuda, and a line about what was made."""
    run = subprocess.run([python_of(environment), "-c", DESCRIBE], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SetupError(f"torch does not import in {environment}: {run.stderr.strip().splitlines()[-1]}")
    build, words, gpu = run.stdout.strip().split(";")
    return build, f"{environment}: {words}, {gpu}"


def needs_cuda_libraries(environment: Path) -> bool:
    """Whether the build that is installed names CUDA libraries as its dependencies; it cannot be imported yet."""
    (metadata,) = environment.glob("lib/python*/site-packages/torch-*.dist-info/METADATA")
    return "\nRequires-Dist: nvidia-" in metadata.read_text()


def clear(environment: Path) -> Path:
    """Removes an environment; where a new one goes. In a path with a space it is a link to a folder without one.

    Ray starts its workers by `bash -c "exec /path/to/python ..."` and does not quote the path, so that in such a folder
    none would start. The scripts that pip writes (`ray`, `serve`, `pytest`) name the folder behind the link.
    """
    shelf = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share", "aptp")
    place = str(environment.absolute())
    folder = (
        shelf / f"{hashlib.sha256(place.encode()).hexdigest()[:12]}{environment.name}" if " " in place else environment
    )
    if environment.is_symlink():
        environment.unlink()
    for old in {environment, folder}:
        if old.exists():
            shutil.rmtree(old)
    if folder != environment:
        if " " in str(folder):
            raise SetupError(
                f"Ray starts no worker from {place}: a path with a space; set XDG_DATA_HOME to one without"
            )
        folder.mkdir(parents=True)
        environment.symlink_to(folder)
    return folder


def make(environment: Path, locks: list[Path], *, project: bool, torch: str, cpu_index: str) -> None:
    link, environment = environment, clear(environment)
    # Not sys.executable: `make` finds this environment's own Python first, and that one is gone now.
    python = Path(sys.base_prefix, "bin", f"python{platform.python_version().rpartition('.')[0]}")
    subprocess.run([python, "-m", "venv", environment], check=True)
    version = pinned("torch", locks)
    if version is not None:
        install_torch(environment, version, torch, cpu_index)
        if needs_cuda_libraries(environment):
            locks = [*locks, CUDA_LOCK]
    must_install(environment, *(f"--requirement={lock}" for lock in locks))
    if project:
        must_install(environment, "--editable", str(ROOT))
    if version is not None:
        build, line = describe(environment)
        (environment / ".torch").write_text(build)
        print(line.replace(str(environment), str(link), 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    parser.add_argument("locks", type=Path, nargs="+")
    parser.add_argument("--project", action="store_true", help="install this checkout too, editable")
    parser.add_argument("--torch", default="auto", help="auto (the default), cpu or cuda")
    parser.add_argument("--cpu-index", default="", help="where else to look for PyTorch's CPU build")
    parser.add_argument("--beside", type=Path, help="an environment whose distributions are seen from this one")
    given = parser.parse_args()
    try:
        refuse_unsupported(this_python())
        if given.torch not in ("auto", "cpu", "cuda"):
            raise SetupError(f"TORCH must be auto, cpu or cuda, it is {given.torch!r}")
        make(given.environment, given.locks, project=given.project, torch=given.torch, cpu_index=given.cpu_index)
    except SetupError as error:
        raise SystemExit(f"error: {error}") from None
    if given.beside:
        (packages,) = given.environment.glob("lib/python*/site-packages")
        (other,) = given.beside.resolve().glob("lib/python*/site-packages")
        (packages / "zz-beside.pth").write_text(f"{other}{os.linesep}")


if __name__ == "__main__":
    main()
