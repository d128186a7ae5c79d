import os
import subprocess
import sys
from pathlib import Path

LIBRARIES = ("jax", "cupy", "tensorflow")
SCRIPT = """
import os, sys
before = dict(os.environ)
import {module}
assert os.environ == before, "the environment was changed"
print(*{libraries!r} & set(sys.modules))
"""


def imported(module: str, fakes: Path) -> set[str]:
    """Which of LIBRARIES, all installed as empty packages, a new process has imported after importing a module."""
    for name in LIBRARIES:
        (fakes / name).mkdir()
        (fakes / name / "__init__.py").write_text("")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(module=module, libraries=set(LIBRARIES))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(fakes), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


def test_optimal_transport_starts_no_other_array_library(tmp_path: Path) -> None:
    assert imported("aptp_platform.serve.routing.overflow", tmp_path) == set()


def test_pot_by_itself_would_start_them(tmp_path: Path) -> None:
    assert imported("ot", tmp_path) == set(LIBRARIES)
