"""Ends all processes of one command when their owner ends, however it ends.

python -I keeper.py <folder> <command> ...

The owner holds the other end of standard input. The keeper ends everything and removes the folder when the command has
ended, when the owner closes that end or is killed, or on SIGTERM. As a Linux "subreaper" it becomes the parent of each
descendant whose own parent has ended, so none escapes by a new session, another title or a fork.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
from types import FrameType

import psutil

GRACE_SECONDS = 3.0  # between SIGTERM and SIGKILL; some of Ray's processes wait for one another for half a minute
LOOK_SECONDS = 0.3
_PR_SET_CHILD_SUBREAPER = 36


def main(folder: str, command: list[str]) -> int:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: _note(told, number, frame))
    nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)  # the command must not hold the owner's pipe
    head = os.posix_spawnp(command[0], command, os.environ, file_actions=[nothing])
    ended = {}
    while not told and head not in ended and not select.select([0], [], [], LOOK_SECONDS)[0]:
        ended = _reap()
    _end_all()
    shutil.rmtree(folder, ignore_errors=True)
    return ended.get(head, 0)


def _note(told: list[int], number: int, frame: FrameType | None) -> None:
    told.append(number)


def _reap() -> dict[int, int]:
    """Exit codes of the children that have ended, by process."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            ended[child[0]] = abs(os.waitstatus_to_exitcode(child[1]))
    return ended


def _end_all() -> None:
    told: set[psutil.Process] = set()
    begun = time.monotonic()
    # A process blocked in the kernel (an unreachable disk) may survive SIGKILL, so the wait is bounded.
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < begun + 2 * GRACE_SECONDS:
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() > begun + GRACE_SECONDS:
                    each.kill()
                elif each not in told:
                    each.terminate()
        told.update(left)
        _reap()
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
