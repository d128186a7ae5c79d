"""What two CPU tricks bring the server, each alone: packed weights, and turns between the replicas of one machine.

    make bench-ablation

Packed weights are removed: `COMMIT` is the last commit that has them and measures them; its tree is laid out in the
work folder and its own script runs there. Turns are `serve/cpu/turns.py`. A gain is of one round, without / with the
trick (images a second: with / without), so above 1 where the trick helps; the arms of a round alternate. A trick earns
its code with a median gain of at least `WANTED` in one of the figures that a user notices: an image of a full batch, a
lone image, throughput, latency.

    packed weights  the expert's step engine, and the router's encoder, in one process of one thread
    turns           four expert replicas on the machine's cores, saturated, idle, and at 70 % of their capacity
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.clock import RESULTS

ROOT: Final = Path(__file__).parents[1]
COMMIT: Final = "72e81e525e051ae641a266b5aad0f11a34a835a6"
WANTED: Final = 1.10

Row = tuple[str, str, str, list[float]]  # trick, release, figure, gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-ablation", help="for the tree and its releases")
    parser.add_argument("--minutes", type=float, default=2.0, help="for each trick and release")
    args = parser.parse_args()
    tree = lay_out(args.work.absolute() / "tree")
    work = ["--work", str(args.work.absolute())]
    run(tree, "benchmarks.ablation", *work, "--seconds", str(60 * args.minutes))
    measured = args.work.absolute() / "turns.json"
    run(ROOT, "benchmarks.ablation_turns", *work, "--minutes", str(args.minutes), "--to", str(measured))
    packed, turns = (json.loads(file.read_text()) for file in (tree / "benchmarks/results/ablation.json", measured))
    rows = [*packed_rows(packed), *turns_rows(turns)]
    print("\n".join(table(rows)))
    found = [
        {"trick": trick, "release": release, "figure": figure, "gains": gains, "median": statistics.median(gains)}
        for trick, release, figure, gains in rows
    ]
    report = {"machine": packed["machine"], "commit": COMMIT, "wanted": WANTED, "rows": found}
    (RESULTS / "ablation.json").write_text(json.dumps(report, indent=1) + "\n")


def lay_out(tree: Path) -> Path:
    """The files of `COMMIT`, without touching the checkout."""
    archive = subprocess.run(["git", "archive", COMMIT], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        sys.exit(f"error: this clone lacks commit {COMMIT[:7]}, which has the tricks: git fetch --unshallow")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tree, filter="data")
    return tree


def run(tree: Path, module: str, *arguments: str) -> None:
    path = os.pathsep.join((str(tree), str(tree / "platform")))
    subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=tree, env={**os.environ, "PYTHONPATH": path}, check=True
    )


def packed_rows(report: dict[str, Any]) -> Iterator[Row]:
    for release, processes in report["releases"].items():
        for process, (off, on) in processes.items():
            for figure in off:
                gains = [without / packed for without, packed in zip(off[figure], on[figure], strict=True)]
                yield "packed weights", release, f"{process}: {figure}", gains


def turns_rows(report: dict[str, Any]) -> Iterator[Row]:
    for release, found in report["releases"].items():
        for figure, gains in found["gains"]["turns"].items():
            yield "turns", release, figure, gains


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown, for docs/benchmarks.md."""
    yield "| trick | release | figure | least | median | most |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for trick, release, figure, gains in rows:
        spread = " | ".join(f"{each:.2f}" for each in (min(gains), statistics.median(gains), max(gains)))
        yield f"| {trick} | {release} | {figure} | {spread} |"


if __name__ == "__main__":
    main()
