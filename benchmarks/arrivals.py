"""Open-loop load: requests are sent when a trace says, whatever the server does, and timed from when they should be."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import httpx

Kind = Literal["poisson", "bursty"]
LEAST: Final = 8  # requests of a trace: a slow server's goes on for longer
Request = tuple[float, str, int]  # seconds from the start, prompt, seed of the image


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

    def requests(self, prompts: Sequence[str]) -> list[Request]:
        draw = random.Random(f"{self.kind} {self.seed}")
        shape = 1.0 if self.kind == "poisson" else 0.25
        sent = 0.0
        result: list[Request] = []
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

    def late(self, limit_s: float) -> int:
        """How many were answered later, or not at all."""
        return sum(latency > limit_s for latency in self.latencies) + self.failed


def play(target: Target, requests: Sequence[Request], enough: Callable[[Outcome], bool] | None = None) -> Outcome:
    """Sends the requests of a trace and waits for every answer.

    enough: says of the outcome so far whether nothing more need be sent; what was not sent is not in the outcome.
    """
    outcome = Outcome([], 0)
    over = asyncio.Event()

    async def one(http: httpx.AsyncClient, due: float, prompt: str, seed: int) -> None:
        nonlocal outcome
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), due - time.perf_counter())
            return
        try:
            ok = (await http.post(target.url, json=target.body(prompt, seed))).status_code == httpx.codes.OK
        except httpx.TransportError:
            ok = False
        if ok:
            outcome.latencies.append(time.perf_counter() - due)
        else:
            outcome = Outcome(outcome.latencies, outcome.failed + 1)
        if enough is not None and enough(outcome):
            over.set()

    async def main() -> None:
        async with _client() as http:
            start = time.perf_counter() + 0.1
            await asyncio.gather(*(one(http, start + sent, prompt, seed) for sent, prompt, seed in requests))

    with target.awake():
        asyncio.run(main())
    return outcome


def capacity(target: Target, seconds: float, prompts: Sequence[str], at_once: int = 32) -> float:
    """Images a second while `at_once` clients ask one after the other, from the first fifth of the time on.

    The clients are twice the places of four experts' batches, or an expert that few ask would idle. The rate is the
    slope of the line through the moments at which images were done: batches finish together, and counting them in a
    window would be off by a batch.
    """
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
    counted = [each for each in done if started + 0.2 * seconds < each <= started + seconds]
    return statistics.linear_regression(counted, range(len(counted))).slope


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None))
