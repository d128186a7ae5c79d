"""Whatever ends the owner or its command, nothing that the command started is left."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from aptp_platform.run import keeper

# Three that a search for descendants or for a mark in the environment would miss: one in a session of its own under
# another environment, one whose parent has ended, and one that ignores SIGTERM.
HIDERS = """
import os, signal, subprocess, sys, time
note = "import os, sys, time; open(sys.argv[1] + '/' + str(os.getpid()), 'w'); time.sleep(600)"
started = [sys.executable, "-c", note, sys.argv[1]]
subprocess.Popen(started, start_new_session=True, env={})
subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.Popen({started!r}, start_new_session=True)"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(started)
time.sleep(600)
"""
OWNER = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Kept:
    """An owner, its keeper, and what that keeps."""

    owner: "subprocess.Popen[str]"
    keeper: psutil.Process
    head: psutil.Process
    hidden: list[psutil.Process]


ENDINGS: dict[str, Callable[[Kept], None]] = {
    "the owner lets go": lambda kept: kept.owner.stdin.close() if kept.owner.stdin else None,
    "the owner is killed": lambda kept: kept.owner.kill(),
    "the keeper gets SIGTERM": lambda kept: kept.keeper.terminate(),
    "the command is killed": lambda kept: kept.head.kill(),
}


def test_nothing_is_left(tmp_path: Path) -> None:
    with ExitStack() as ends:
        every = {name: _keep(tmp_path / name, ends) for name in ENDINGS}  # side by side: each takes its time to end
        for name, end in ENDINGS.items():
            end(every[name])
        for name, kept in every.items():
            psutil.wait_procs([*kept.hidden, kept.head], timeout=20)
            assert [each for each in [*kept.hidden, kept.head] if each.is_running()] == [], name
            deadline = time.monotonic() + 10
            while (tmp_path / name / "folder").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not (tmp_path / name / "folder").exists(), name


def _keep(place: Path, ends: ExitStack) -> Kept:
    folder, notes = place / "folder", place / "notes"
    folder.mkdir(parents=True)
    notes.mkdir()
    command = [sys.executable, "-I", keeper.__file__, str(folder), sys.executable, "-c", HIDERS, str(notes)]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ends.enter_context(owner)
    ends.callback(owner.kill)
    assert owner.stdout is not None
    kept = psutil.Process(int(owner.stdout.readline()))
    deadline = time.monotonic() + 60
    while len(list(notes.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    hidden = [psutil.Process(int(each.name)) for each in notes.iterdir()]
    assert len(hidden) == 3
    for each in hidden:
        ends.callback(_kill, each)
    (head,) = (each for each in kept.children() if HIDERS in each.cmdline())
    return Kept(owner, kept, head, hidden)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
