"""Load and faults for a server, as functions of how long and how many: the suite runs them short, a soak long."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

GENERATE = "/v1/images/generations"


@dataclass(frozen=True)
class Overload:
    """What came of an overload: answers by status, the slowest answer, memory, and the first calm answer after it."""

    statuses: Counter[int]
    slowest_s: float
    memory_growth: float
    recovery_s: float


def client(url: str, timeout: float = 120.0) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)


def running(url: str) -> int:
    """Images that the server makes or queues now."""
    return sum(load["running"] for load in httpx.get(f"{url}/ready", timeout=60).json()["models"].values())


def settles(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition holds within some time."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


def replicas(name: str = "") -> list[psutil.Process]:
    """The processes of a deployment's replicas, or of all, among this very session's children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith(f"ray::ServeReplica:aptp:{name}"):
                found.append(process)
    return found


def memory() -> int:
    """Bytes that the replicas have for themselves."""
    return sum(process.memory_full_info().uss for process in replicas())


def overload(url: str, body: dict[str, Any], *, seconds: float, factor: float = 3.0, least: int = 72) -> Overload:
    """Sends `factor` times what the server can do, whatever comes back, and looks how it comes out of it.

    Args:
        least: so many requests even if that takes longer: a slow machine must fill its queue too.
    """
    rate = factor * asyncio.run(_capacity(url, body))
    before = memory()
    statuses: Counter[int] = Counter()
    slowest = 0.0

    async def one(http: httpx.AsyncClient) -> None:
        nonlocal slowest
        started = time.monotonic()
        answer = await http.post(GENERATE, json=body)
        slowest = max(slowest, time.monotonic() - started)
        statuses[answer.status_code] += 1

    async def main() -> None:
        async with client(url) as http:
            started = time.monotonic()
            tasks: list[asyncio.Task[None]] = []
            while (elapsed := time.monotonic() - started) < seconds or len(tasks) < least:
                while len(tasks) < rate * elapsed:
                    tasks.append(asyncio.create_task(one(http)))
                await asyncio.sleep(0.005)
            await asyncio.gather(*tasks)

    asyncio.run(main())
    ended = time.monotonic()
    assert httpx.post(f"{url}{GENERATE}", json=body, timeout=120).status_code == httpx.codes.OK
    return Overload(statuses, slowest, memory() / before - 1, time.monotonic() - ended)


async def _capacity(url: str, body: dict[str, Any], count: int = 24, at_once: int = 8) -> float:
    """Images a second with a full batch."""
    places = asyncio.Semaphore(at_once)
    async with client(url) as http:

        async def one() -> None:
            async with places:
                assert (await http.post(GENERATE, json=body)).status_code == httpx.codes.OK

        started = time.monotonic()
        await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.monotonic() - started)


def hang_up(url: str, body: dict[str, Any], *, clients: int, after_s: float = 1.0) -> None:
    """Clients that ask, half of them for a stream, and are gone before their image is there."""

    async def one(http: httpx.AsyncClient, streamed: bool) -> None:
        with contextlib.suppress(httpx.TransportError, TimeoutError):
            async with asyncio.timeout(after_s), http.stream("POST", GENERATE, json={**body, "stream": streamed}) as it:
                async for _ in it.aiter_bytes():
                    pass

    async def main() -> None:
        async with client(url) as http:
            await asyncio.gather(*(one(http, bool(index % 2)) for index in range(clients)))

    asyncio.run(main())


def during(
    url: str, bodies: list[dict[str, Any]], disturb: Callable[[], Any], *, at_once: int = 4, after_s: float = 1.0
) -> list[tuple[dict[str, Any], httpx.Response]]:
    """Every body and its answer, while clients ask one after the other, from before a disturbance until after it."""

    async def main() -> list[tuple[dict[str, Any], httpx.Response]]:
        answers: list[tuple[dict[str, Any], httpx.Response]] = []
        over = asyncio.Event()

        async def ask(http: httpx.AsyncClient, first: int) -> None:
            index = first
            while not over.is_set():
                body = bodies[index % len(bodies)]
                answers.append((body, await http.post(GENERATE, json=body)))
                index += at_once

        async with client(url, timeout=300) as http:
            askers: list[Awaitable[None]] = [asyncio.create_task(ask(http, first)) for first in range(at_once)]
            while not answers:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(disturb)
            await asyncio.sleep(after_s)
            over.set()
            await asyncio.gather(*askers)
        return answers

    return asyncio.run(main())
