"""Writes the lock files from `pyproject.toml`, or checks them: one resolution by uv for every Python that is supported.

    requirements.lock        what jobs and servers need, without CUDA libraries
    requirements-cuda.lock   what PyTorch's CUDA build needs beside it
    requirements-dev.lock    what tests, checks and the example's build need beside it
    requirements-bench.lock  the peer that `make bench-serve` measures, beside requirements.lock
    requirements-s3.lock     the S3 server of the tests, in an environment of its own

`make setup` installs without dependencies, so what a lock lacks is missed only when something imports it. `--check`
therefore resolves again, by the index's metadata, and keeps every locked version that is allowed. The result is the
locks themselves, or a lock lacks something, holds a version that something forbids, or holds what nothing needs. A new
release changes nothing in it. An index that does not answer is no fault of the locks: that is said, and nothing fails.

uv reads no pip configuration: the index is PyPI unless UV_DEFAULT_INDEX names another, and local files are not seen.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from packaging.requirements import Requirement

from install.platforms import PYTHONS, ROOT, markers

EXTRAS = ("encoders", "serve", "train")
WORDS = {
    "requirements.lock": "what jobs and servers need",
    "requirements-cuda.lock": "what PyTorch's CUDA build needs beside requirements.lock",
    "requirements-dev.lock": "what tests and checks need beside requirements.lock",
    "requirements-bench.lock": "what `make bench-serve` needs beside requirements.lock",
    "requirements-s3.lock": "the S3 server of the tests",
}
HEADER = "# `make lock` writes this file: {}. Install it with --no-deps.\n"
UNREACHABLE = ("error sending request", "Request failed after", "HTTP status server error")
WITHOUT_WHEELS = ("deepspeed",)  # a source archive that compiles nothing at its installation


class UnreachableError(Exception):
    """The index did not answer."""


def uv(folder: Path, *arguments: str) -> None:
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--no-header"]
    command += [f"--python={sys.executable}", *arguments]
    run = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if run.returncode != 0:
        if any(words in run.stderr for words in UNREACHABLE):
            raise UnreachableError(re.sub(r"\n\s*cause: ", ": ", run.stderr.strip()).splitlines()[0])
        raise SystemExit(f"error: no versions fit pyproject.toml and the index:\n{run.stderr.strip()}")


def resolve(folder: Path, known: str, *what: str) -> dict[str, set[str]]:
    """The pins that uv finds, which are those in `known` where they are allowed, and who asks for each."""
    with tempfile.TemporaryDirectory() as scratch:
        lock = Path(scratch) / "lock"
        lock.write_text(known)
        python = f"--python-version={PYTHONS[0]}"
        uv(folder, "--universal", "--annotation-style=line", python, *what, f"--output-file={lock}")
        lines = [line.partition("  # via ") for line in lock.read_text().splitlines()]
    return {pin: set(askers.split(", ")) for line, _, askers in lines if (pin := simplified(line))}


def simplified(line: str) -> str:
    """A pin with the part of its marker that tells the supported Pythons apart; empty if none of them needs it."""
    pin = Requirement(line)
    wanted = [python for python in PYTHONS if pin.marker is None or pin.marker.evaluate(markers(python))]
    only = " or ".join(f"python_version == {each!r}" for each in wanted)
    where = "" if len(wanted) == len(PYTHONS) else f" ; {only}"
    return f"{pin.name}{pin.specifier}{where}" if wanted else ""


def cuda_libraries(pins: Mapping[str, set[str]]) -> set[str]:
    """Those that PyTorch's CUDA build alone asks for, directly or through one another."""
    named = {pin for pin in pins if re.match(r"(nvidia|cuda)-|triton==", pin)}
    while others := {pin for pin in named if not pins[pin] <= {"torch", *(each.partition("==")[0] for each in named)}}:
        named -= others
    return named


def locks(folder: Path, known: Mapping[str, str]) -> dict[str, list[str]]:
    """The pins of every lock file, by its name."""
    run = ("pyproject.toml", *(f"--extra={extra}" for extra in EXTRAS))
    shared = "".join(text for name, text in known.items() if name != "requirements-s3.lock")
    # Tests run what is served, at the same versions: both are resolved together, then the run's part of it is taken.
    everything = resolve(folder, shared, *run, "--group=dev", "--group=data")
    needed = resolve(folder, "\n".join(everything), *run)
    peer = resolve(folder, "\n".join([*needed, shared]), *run, "--group=bench")
    s3 = resolve(folder, known.get("requirements-s3.lock", ""), "--group=pyproject.toml:s3-server")
    cuda = cuda_libraries(needed)
    parts = (set(needed) - cuda, cuda, everything.keys() - needed.keys(), peer.keys() - needed.keys(), set(s3))
    return {
        name: sorted(pins, key=lambda pin: pin.partition("==")[::2]) for name, pins in zip(WORDS, parts, strict=True)
    }


def by_name(pins: Iterable[str]) -> dict[str, str]:
    """The pins of each distribution on one line; it has several where the Pythons need different versions."""
    grouped = groupby(sorted(pins), lambda pin: pin.partition("==")[0])
    return {name: " and ".join(group) for name, group in grouped}


def differences(found: str, wanted: list[str]) -> list[str]:
    """What is wrong with a lock file's text, a line each."""
    have, want = by_name(line for line in found.splitlines() if not line.startswith("#")), by_name(wanted)
    lines = [f"lacks {pins}" for name, pins in want.items() if name not in have]
    lines += [f"has {have[name]}, allowed is {pins}" for name, pins in want.items() if have.get(name, pins) != pins]
    return lines + [f"has {pins}, which nothing needs" for name, pins in have.items() if name not in want]


def require_wheels(folder: Path) -> None:
    """Every pin but the S3 server's has a wheel for every Python that is supported, and for a glibc of 2018."""
    sources = [f"--no-binary={name}" for name in WITHOUT_WHEELS]
    names = [name for name in WORDS if name != "requirements-s3.lock"]
    for python in PYTHONS:
        where = (f"--python-version={python}", "--python-platform=x86_64-manylinux_2_28")
        uv(folder, "--no-deps", "--only-binary=:all:", *sources, *where, *names)


def check(folder: Path, known: Mapping[str, str]) -> None:
    try:
        wanted = locks(folder, known)
    except UnreachableError as error:
        print(f"locks: not checked, the index does not answer ({error})")
        return
    wrong = [f"{name} {line}" for name in WORDS for line in differences(known.get(name, ""), wanted[name])]
    if wrong:
        raise SystemExit("\n".join([*wrong, "error: the locks do not fit pyproject.toml: run `make lock KEEP=1`"]))
    print(f"locks: whole for Python {', '.join(PYTHONS)}, with PyTorch's CPU build and its CUDA build")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing; fail if a lock is not what it should be")
    mode.add_argument("--keep", action="store_true", help="change only what is missing or no longer allowed")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where pyproject.toml and the locks are")
    given = parser.parse_args()
    known = {name: (given.folder / name).read_text() for name in WORDS if (given.folder / name).exists()}
    if given.check:
        check(given.folder, known)
        return
    try:
        for name, pins in locks(given.folder, known if given.keep else {}).items():
            (given.folder / name).write_text(HEADER.format(WORDS[name]) + "".join(f"{pin}\n" for pin in pins))
        require_wheels(given.folder)
    except UnreachableError as error:
        raise SystemExit(f"error: the index does not answer ({error})") from None


if __name__ == "__main__":
    main()
