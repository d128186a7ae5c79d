"""Measurements that hold on a busy machine, as ratios: process CPU seconds and peak memory of calls in one process."""

import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Figure:
    """One measured quantity beside its target."""

    what: str
    value: float
    target: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target


def cpu_seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of every call the least process CPU seconds over some rounds, in which the calls take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.process_time()
            kept = call()
            best[name] = min(best[name], time.process_time() - started)
            del kept
    return best


def return_freed_memory() -> None:
    """From here on every freed tensor goes back to the system at once, so that a peak is one (glibc only; slower)."""
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def peak_growth(call: Callable[[], object]) -> int:
    """By how many bytes a call raised the process's resident memory at its highest."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    kept = call()
    grown = _status("VmHWM") - before
    del kept
    return grown


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_table(figures: Sequence[Figure]) -> None:
    width = max(len(figure.what) for figure in figures)
    print(f"{'':{width}}  measured    target")
    for figure in figures:
        sign = ">=" if figure.at_least else "<="
        verdict = "" if figure.met else "  MISSED"
        print(
            f"{figure.what:{width}} {figure.value:9.3f} {sign:>4} {figure.target:5.2f} {figure.unit}{verdict}".rstrip()
        )


def write_results(name: str, figures: Sequence[Figure], **details: Any) -> Path:
    """A JSON file below `benchmarks/results`: machine, figures, and whatever else was measured."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    rows = [asdict(figure) | {"met": figure.met} for figure in figures]
    file.write_text(json.dumps({"machine": machine(), "figures": rows, **details}, indent=1) + "\n")
    return file
