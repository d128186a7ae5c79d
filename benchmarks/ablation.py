"""What the CPU trick of `serve/cpu/` brings: a replica's engine with packed weights against the same engine without.

    make bench-ablation

An engine of one thread in this process, for the second code of each release. The arms alternate, so that a busy machine
meets them alike; a gain is of one round, off / on, above 1 where the trick helps. CPU seconds stand beside the wall's,
which say little where others compute on the same cores. A trick whose median gain is below 1.10 for every release and
load is not worth its code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from aptp.release import Release, read_release
from aptp.router import Router
from aptp_platform.serve.cpu.packing import PackedWeights
from aptp_platform.serve.engine.batching import StepEngine
from aptp_platform.serve.engine.denoising import Denoiser, Sample, SampleSpec
from aptp_platform.serve.engine.expert import load_denoiser
from aptp_platform.serve.routing.prompt_cache import score_prompts
from benchmarks.bench_release import PROMPTS, bench_release, emoji_release
from benchmarks.clock import RESULTS, machine

ROOT: Final = Path(__file__).parents[1]
CODE: Final = 1  # its MACs ratio is 0.6 in the releases that are made here
BATCH: Final = 4
WANTED: Final = 1.10

Figures = dict[str, list[float]]  # of each figure the values of all rounds


@dataclass(frozen=True)
class Subject:
    """A release, and the requests that its server is configured for."""

    name: str
    release: Release
    steps: int
    guidance: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-ablation", help="where the releases are made")
    parser.add_argument("--seconds", type=float, default=150.0, help="for each release")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine(), "wanted": WANTED, "releases": {}}
    print(f"{'release, process, figure':58} {'min':>6} {'median':>6} {'max':>6}  off / on")
    for subject in subjects(args.work):
        found = {"expert": asyncio.run(expert(subject, args.seconds)), "router": router(subject.release)}
        report["releases"][subject.name] = found
        for process, (off, on) in found.items():
            for name in off:
                gains = [one / other for one, other in zip(off[name], on[name], strict=True)]
                spread = " ".join(f"{each:6.3f}" for each in (min(gains), statistics.median(gains), max(gains)))
                print(f"{subject.name + ', ' + process + ', ' + name:58} {spread}  {len(gains)} rounds", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ablation.json").write_text(json.dumps(report, indent=1) + "\n")


def subjects(work: Path) -> list[Subject]:
    """The bench's release, one of the emoji teacher's shapes, and the demo's own where it was made."""
    found = [
        Subject("bench", bench_release(work / "bench"), 8, 7.5),
        Subject("emoji", emoji_release(work / "emoji"), 15, 5.0),
    ]
    demo = ROOT / "runs/demo/release"
    return [*found, Subject("demo", read_release(demo), 15, 5.0)] if (demo / "release.json").exists() else found


async def expert(subject: Subject, seconds: float) -> tuple[Figures, Figures]:
    """Seconds an image, of a full batch and of a lone one, without and with packed weights."""
    plain, packed = denoisers = [
        load_denoiser(subject.release, CODE, device="cpu", dtype=torch.float32) for _ in range(2)
    ]
    height, width = (plain.pixels_per_latent * side for side in subject.release.info.latent_size)
    spec = SampleSpec("", 0, subject.steps, subject.guidance, (width, height))
    PackedWeights.of(packed.networks, lambda: first_step(packed, spec))
    first_step(plain, spec)
    engines = [StepEngine(denoiser, max_batch_size=BATCH, max_waiting=BATCH) for denoiser in denoisers]
    figures: tuple[Figures, Figures] = ({}, {})
    ends = time.monotonic() + seconds
    number = 0
    while time.monotonic() < ends or number < 3:
        specs = [replace(spec, prompt=PROMPTS[(4 * number + each) % len(PROMPTS)], seed=each) for each in range(BATCH)]
        both = list(zip(engines, figures, strict=True))
        for engine, values in both if number % 2 else reversed(both):  # neither is always the first
            await timed(values, "an image of a full batch", engine, specs)
            await timed(values, "a lone image", engine, specs[:1])
        number += 1
    for engine in engines:
        await engine.close()
    return figures


async def timed(values: Figures, name: str, engine: StepEngine, specs: Sequence[SampleSpec]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(engine.generate, specs))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    values.setdefault(f"{name}, wall s", []).append(wall / len(specs))
    values.setdefault(f"{name}, CPU s", []).append(cpu / len(specs))


def first_step(denoiser: Denoiser, spec: SampleSpec) -> None:
    samples = [sample for sample in denoiser.admit([spec]) if isinstance(sample, Sample)]
    denoiser.step(samples)
    denoiser.decode(samples)


def router(release: Release) -> tuple[Figures, Figures]:
    """Seconds a prompt, of a lone one and of a batch, without and with packed weights."""
    figures: tuple[Figures, Figures] = ({}, {})
    routers = [Router.load(release.router_path) for _ in figures]
    encoder = routers[1].encoder
    assert encoder is not None
    PackedWeights.of([encoder.model], lambda: encoder.encode(["a prompt"]))
    for each in routers:
        score_prompts(each, PROMPTS[:32], None)
    for _ in range(10):
        for each, values in zip(routers, figures, strict=True):
            for name, prompts in (("a lone prompt", PROMPTS[:1]), ("a prompt of 32", PROMPTS[:32])):
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(len(PROMPTS[:32]) // len(prompts)):
                    score_prompts(each, prompts, None)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                values.setdefault(f"{name}, wall s", []).append(wall / 32)
                values.setdefault(f"{name}, CPU s", []).append(cpu / 32)
    return figures


if __name__ == "__main__":
    main()
