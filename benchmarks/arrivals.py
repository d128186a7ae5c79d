"""Open-loop load: requests are sent when a trace says, whatever the server does, and timed from when they should be."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import httpx

Kind = Literal["poisson", "bursty"]
LEAST: Final = 8  # requests of a trace: a slow server's goes on for longer


@dataclass(frozen=True)
class Target:
    """A server under test: where to post, and the body of one request. group: of its processes, if they are stopped
    while nobody asks it."""

    url: str
    body: Callable[[str, int], dict[str, Any]]
    group: int | None = None

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets its processes run meanwhile."""
        if self.group is not None:
            os.killpg(self.group, signal.SIGCONT)
        try:
            yield
        finally:
            if self.group is not None:
                os.killpg(self.group, signal.SIGSTOP)


@dataclass(frozen=True)
class Trace:
    """What is sent when. The same seed, kind and count are the same trace at any rate, stretched: runs are paired.

    bursty: gamma gaps of shape 1/4, so twice the deviation of Poisson's.
    """

    kind: Kind
    seed: int
    rate: float
    seconds: float

    def requests(self, prompts: Sequence[str]) -> list[tuple[float, str, int]]:
        """(seconds from the start, prompt, image seed)."""
        draw = random.Random(f"{self.kind} {self.seed}")
        shape = 1.0 if self.kind == "poisson" else 0.25
        sent = 0.0
        result: list[tuple[float, str, int]] = []
        while True:
            sent += draw.gammavariate(shape, 1 / shape) / self.rate
            prompt, seed = draw.choice(prompts), draw.randrange(2**31)
            if sent > self.seconds and len(result) >= LEAST:
                return result
            result.append((sent, prompt, seed))


@dataclass(frozen=True)
class Outcome:
    """Latencies of the answers in seconds; requests that got another status than 200 are in `failed`."""

    latencies: list[float]
    failed: int

    def percentile(self, share: float) -> float:
        """Of all requests; a failed one is infinitely late."""
        ordered = sorted([*self.latencies, *[math.inf] * self.failed])
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    def within(self, limit_s: float) -> float:
        """The share of the requests that were answered in time."""
        return sum(latency <= limit_s for latency in self.latencies) / (len(self.latencies) + self.failed)


def play(target: Target, trace: Trace, prompts: Sequence[str]) -> Outcome:
    """Sends a trace and waits for every answer."""
    latencies: list[float] = []
    failed = 0

    async def one(http: httpx.AsyncClient, due: float, prompt: str, seed: int) -> None:
        nonlocal failed
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        try:
            ok = (await http.post(target.url, json=target.body(prompt, seed))).status_code == httpx.codes.OK
        except httpx.TransportError:
            ok = False
        if ok:
            latencies.append(time.perf_counter() - due)
        else:
            failed += 1

    async def main() -> None:
        async with _client() as http:
            start = time.perf_counter() + 0.1
            await asyncio.gather(
                *(one(http, start + sent, prompt, seed) for sent, prompt, seed in trace.requests(prompts))
            )

    with target.awake():
        asyncio.run(main())
    return Outcome(latencies, failed)


def capacity(target: Target, seconds: float, prompts: Sequence[str], at_once: int = 16) -> float:
    """Images a second while `at_once` clients ask one after the other; the first and last moments do not count."""
    done: list[float] = []

    async def client(http: httpx.AsyncClient, number: int, ends: float) -> None:
        draw = random.Random(number)
        while time.perf_counter() < ends:
            answer = await http.post(target.url, json=target.body(draw.choice(prompts), draw.randrange(2**31)))
            answer.raise_for_status()
            done.append(time.perf_counter())

    async def main() -> None:
        async with _client() as http:
            ends = time.perf_counter() + seconds
            await asyncio.gather(*(client(http, number, ends) for number in range(at_once)))

    started = time.perf_counter()
    with target.awake():
        asyncio.run(main())
    first, last = started + 0.2 * seconds, started + seconds
    return sum(first < each <= last for each in done) / (last - first)


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None))
