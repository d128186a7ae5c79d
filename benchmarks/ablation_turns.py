"""What turns bring four expert replicas on two cores: the same replicas with turns and without, in alternation.

    make bench-ablation

A process of one thread for every code, with its step engine. A gain is of one round, above 1 where turns help:

    images a second     all replicas, each with twice a full batch of requests
    CPU s an image      of all replicas under that load
    a lone image        latency while nothing else is asked for
    mean, p95 at 70 %   latencies of Poisson arrivals at 70 % of what the replicas make without turns
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch

from aptp.release import Release, read_release
from aptp_platform.serve.cpu.turns import Turns
from aptp_platform.serve.engine.batching import Cycle, StepEngine
from aptp_platform.serve.engine.denoising import Denoiser, Sample, SampleSpec
from aptp_platform.serve.engine.expert import load_denoiser
from benchmarks.bench_release import PROMPTS, bench_release, emoji_release
from benchmarks.clock import machine

ROOT: Final = Path(__file__).parents[1]
PLAIN: Final = "plain"
ARMS: Final = (PLAIN, "turns")
BATCH: Final = 4
SHARE: Final = 0.7  # of the capacity, at which latencies are taken


@dataclass(frozen=True)
class Subject:
    """A release, and the requests that its server is configured for."""

    name: str
    release: Release
    steps: int
    guidance: float


@dataclass(frozen=True)
class Order:
    """What a replica shall do now; `due` is the monotonic times of requests."""

    arm: str
    seconds: float = 0.0  # of saturation, if not 0
    lone: int = 0  # images one after the other
    due: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answer:
    images_per_s: float = 0.0
    cpu_s: float = 0.0
    latencies: tuple[float, ...] = ()


class Replica:
    """An expert's engines, one an arm, in a process of its own."""

    def __init__(self, subject: Subject, index: int) -> None:
        torch.set_num_threads(1)
        kept = [load_denoiser(subject.release, index, device="cpu", dtype=torch.float32)]
        height, width = (kept[0].pixels_per_latent * side for side in subject.release.info.latent_size)
        self._spec = SampleSpec("", 0, subject.steps, subject.guidance, (width, height))
        self._warm_up(kept[0])
        self._numbers = count(100 * index)
        self._steps: list[tuple[float, int]] = []  # when, samples
        self._engines = {
            PLAIN: self._engine(kept[0]),
            "turns": self._engine(kept[0], Turns(f"ablation-{os.getppid()}", os.cpu_count() or 1)),
        }

    def _engine(self, denoiser: Denoiser, turns: Turns | None = None) -> StepEngine:
        return StepEngine(denoiser, max_batch_size=BATCH, max_waiting=10_000, turns=turns, observe=self._observe)

    def _warm_up(self, denoiser: Denoiser) -> None:
        samples = [sample for sample in denoiser.admit([self._spec]) if isinstance(sample, Sample)]
        denoiser.step(samples)
        denoiser.decode(samples)

    def _observe(self, cycle: Cycle) -> None:
        self._steps.append((time.monotonic(), cycle.batch_size))

    async def serve(self, orders: Connection) -> None:
        while (order := await asyncio.to_thread(orders.recv)) is not None:
            orders.send(await self._do(self._engines[order.arm], order))

    async def _do(self, engine: StepEngine, order: Order) -> Answer:
        if order.seconds:
            return await self._saturate(engine, order.seconds)
        lone = [await self._image(engine, time.monotonic()) for _ in range(order.lone)]
        return Answer(latencies=(*lone, *await asyncio.gather(*(self._image(engine, due) for due in order.due))))

    async def _saturate(self, engine: StepEngine, seconds: float) -> Answer:
        await asyncio.sleep(0.2)  # every replica has its order by now
        self._steps.clear()
        cpu, ends = time.process_time(), time.monotonic() + seconds

        async def client() -> None:
            while True:
                await self._image(engine, time.monotonic())

        clients = [asyncio.create_task(client()) for _ in range(2 * BATCH)]
        await asyncio.sleep(seconds)
        cpu = time.process_time() - cpu
        steps = [samples for when, samples in self._steps if when <= ends]
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        while engine.running or engine.waiting:
            await asyncio.sleep(0.01)
        images = sum(steps) / self._spec.num_inference_steps
        return Answer(images / seconds, cpu)

    async def _image(self, engine: StepEngine, due: float) -> float:
        await asyncio.sleep(due - time.monotonic())
        number = next(self._numbers)
        spec = self._spec
        await engine.generate(
            SampleSpec(PROMPTS[number % len(PROMPTS)], number, spec.num_inference_steps, spec.guidance_scale, spec.size)
        )
        return time.monotonic() - due


def replica(orders: Connection, subject: Subject, index: int) -> None:
    made = Replica(subject, index)
    orders.send(None)  # ready
    asyncio.run(made.serve(orders))


class Replicas:
    """One replica a code of a subject."""

    def __init__(self, orders: Sequence[Connection]) -> None:
        self._orders = orders

    @staticmethod
    @contextmanager
    def of(subject: Subject) -> Iterator[Replicas]:
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in subject.release.codes]
        processes = [
            context.Process(target=replica, args=(theirs, subject, index), daemon=True)
            for index, (_, theirs) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for ours, _ in pipes:
            ours.recv()
        yield Replicas([ours for ours, _ in pipes])
        for ours, _ in pipes:
            ours.send(None)
        for process in processes:
            process.join()

    def saturated(self, arm: str, seconds: float) -> tuple[float, float]:
        """Images a second, CPU seconds an image."""
        answers = self._all([Order(arm, seconds=seconds)] * len(self._orders))
        rate = sum(answer.images_per_s for answer in answers)
        return rate, sum(answer.cpu_s for answer in answers) / (rate * seconds)

    def lone(self, arm: str, images: int) -> float:
        """Median latency, one replica after the other."""
        found: list[float] = []
        for orders in self._orders:
            orders.send(Order(arm, lone=images))
            found += orders.recv().latencies
        return statistics.median(found)

    def arrivals(self, arm: str, rate: float, seconds: float, seed: int) -> tuple[float, float]:
        """Mean and 95th percentile of the latencies of Poisson arrivals."""
        draw = random.Random(seed)
        due: list[list[float]] = [[] for _ in self._orders]
        sent = time.monotonic() + 0.1
        ends = sent + seconds
        while (sent := sent + draw.expovariate(rate)) < ends:
            draw.choice(due).append(sent)
        answers = self._all([Order(arm, due=tuple(times)) for times in due])
        latencies = sorted(each for answer in answers for each in answer.latencies)
        return statistics.fmean(latencies), latencies[int(0.95 * (len(latencies) - 1))]

    def _all(self, what: Sequence[Order]) -> list[Answer]:
        for orders, order in zip(self._orders, what, strict=True):
            orders.send(order)
        return [orders.recv() for orders in self._orders]


def measure(subject: Subject, minutes: float) -> dict[str, dict[str, list[float]]]:
    """Of each arm each figure, round by round."""
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    with Replicas.of(subject) as replicas:
        capacity, _ = replicas.saturated(PLAIN, 8.0)
        for arm in ARMS:
            replicas.lone(arm, 1)
        ends = time.monotonic() + 60 * minutes
        for number in count():
            if time.monotonic() > ends:
                return found
            order = ARMS[number % len(ARMS) :] + ARMS[: number % len(ARMS)]  # nobody is always the first
            figures: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
            for arm in order:
                rate, cpu = replicas.saturated(arm, 5.0)
                figures[arm].update({"images a second": rate, "CPU s an image": cpu})
            for arm in order:
                figures[arm]["a lone image, s"] = replicas.lone(arm, 2)
            for arm in order:
                mean, late = replicas.arrivals(arm, SHARE * capacity, 10.0, number)
                figures[arm].update({f"mean at {SHARE:.0%}, s": mean, f"p95 at {SHARE:.0%}, s": late})
            for arm, values in figures.items():
                for name, value in values.items():
                    found[arm].setdefault(name, []).append(value)
    raise AssertionError


def gains(on: dict[str, list[float]], off: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of each figure, round by round, how many times better it is."""
    return {
        name: [
            mine / other if name == "images a second" else other / mine
            for mine, other in zip(on[name], off[name], strict=True)
        ]
        for name in on
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-ablation", help="where the releases are made")
    parser.add_argument("--to", type=Path, required=True, help="a JSON file for what is measured")
    parser.add_argument("--minutes", type=float, default=3.5, help="for each release")
    args = parser.parse_args()
    bench = Subject("bench", bench_release(args.work / "bench"), 8, 7.5)
    demo = ROOT / "runs/demo/release"
    emoji = (
        Subject("demo", read_release(demo), 15, 5.0)
        if (demo / "release.json").exists()
        else Subject("emoji", emoji_release(args.work / "emoji"), 15, 5.0)
    )
    report: dict[str, Any] = {"machine": machine(), "releases": {}}
    for subject in (bench, emoji):
        found = measure(subject, args.minutes)
        rows = {arm: gains(found[arm], found[PLAIN]) for arm in ARMS if arm != PLAIN}
        report["releases"][subject.name] = {"figures": found, "gains": rows}
    args.to.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
