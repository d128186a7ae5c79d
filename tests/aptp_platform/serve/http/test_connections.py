"""Who sends headers without end, many, slow or malformed ones is refused, and the others are served meanwhile."""

import asyncio
import resource
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from socket import create_connection, socket
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from aptp_platform.run.cluster import free_ports
from aptp_platform.serve.http import connections
from aptp_platform.serve.http.connections import CALLBACK, LIMITS, limit_connections, limited

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    await Request(scope, receive).body()
    await PlainTextResponse("ok")(scope, receive, send)


@contextmanager
def server() -> Iterator[int]:
    """uvicorn as Serve's proxy starts it, in a thread; the port."""
    (port,) = free_ports(1)
    limit_connections()
    config = uvicorn.Config(ok, port=port, log_config=None, lifespan="off", access_log=False)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve()))
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield port
    finally:
        running.should_exit = True
        thread.join()
        HTTP_PROTOCOLS["auto"] = "uvicorn.protocols.http.auto:AutoHTTPProtocol"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with server() as running:
        yield running


def answer(sent: Any, port: int) -> bytes:
    """What comes back until the server closes the connection."""
    with closing(create_connection(("127.0.0.1", port), timeout=10)) as stream:
        told = b""
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in sent:
                stream.sendall(piece)
        with suppress(ConnectionResetError):
            while piece := stream.recv(65_536):
                told += piece
        return told


def test_few_and_short_headers_are_served_and_a_connection_lives_on(port: int) -> None:
    long = b"x" * 60_000
    told = answer([HEAD + b"a: " + long + b"\r\n\r\n", HEAD + b"a: " + long + b"\r\nConnection: close\r\n\r\n"], port)
    assert told.count(b"200 OK") == 2
    body = b"y" * 1_000_000
    post = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000000\r\n\r\n"
    assert b"200 OK" in answer([post, body], port)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([HEAD + b"a: " + b"x" * 70_000, b"\r\n\r\n"], b"431"),
        ([b"GET /" + b"x" * 70_000], b"431"),
        ([HEAD + b"".join(b"a%d: b\r\n" % index for index in range(101)) + b"\r\n"], b"431"),
        ([b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 20_000], b"431"),
        ([b"nonsense\r\n\r\n"], b"400"),
    ],
)
def test_what_is_too_much_gets_its_own_answer(port: int, sent: list[bytes], status: bytes) -> None:
    first, _, rest = answer(sent, port).rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n")
    assert first.startswith(status), first
    assert b'"error"' in rest


def test_slow_headers_end_in_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEAD_S", 0.2)
    for begin in (b"", b"GET / HTTP/1.1\r\nHo", HEAD.replace(b"Host", b"a: b\r\nHost") + b"\r\n" + b"GET"):
        assert b"408" in answer([begin], port).rpartition(b"HTTP/1.1 ")[2][:3]


def test_an_endless_header_costs_the_others_little_and_no_memory(port: int) -> None:
    def median_s() -> float:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            times = []
            for _ in range(60):
                time.sleep(0.01)
                started = time.perf_counter()
                assert http.get("/").text == "ok"
                times.append(time.perf_counter() - started)
            return statistics.median(times)

    over = threading.Event()

    def flood() -> None:
        def pieces() -> Iterator[bytes]:
            yield HEAD + b"a: "
            while not over.is_set():
                yield b"x" * 65_536
                time.sleep(0.001)

        while not over.is_set():
            answer(pieces(), port)

    quiet = median_s()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slow: list[socket] = [create_connection(("127.0.0.1", port)) for _ in range(50)]
    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        assert median_s() < 2 * quiet + 0.01, "0.01 s for a machine that is busy with other tests"
    finally:
        over.set()
        flooding.join()
        for each in slow:
            each.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "KiB"


def test_limits_are_known_by_the_environment_of_the_node() -> None:
    assert not limited({})
    assert limited({CALLBACK: LIMITS})
    assert limited({"RAY_SERVE_ENABLE_HA_PROXY": "1"})
    assert not limited({CALLBACK: "another:callback"})
