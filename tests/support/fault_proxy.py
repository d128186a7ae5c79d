"""A proxy in front of the S3 server that can misbehave: answers of 503, connections that are reset or stall."""

import http.client
import itertools
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest

from tests.support.s3_server import S3Server

Fault = Literal["503", "reset", "stall"]
FAULTS: tuple[Fault, ...] = ("503", "reset", "stall")


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on, but for those that meet a fault: all while `fault` is set, and `every` so-manieth one.

    `hits` counts what went wrong. A stalled request is never answered. `refuse` names, for a method and a path, a
    status to answer with, or none; `headers` go with it. Headers in `dropped` are not passed on, as if the server did
    not know them.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.fault: Fault | None = None
        self.every = 0  # none
        self.requests = itertools.count(1)
        self.hits: Counter[str] = Counter()
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.headers: dict[str, str] = {}
        self.dropped: tuple[str, ...] = ()
        self.over = threading.Event()

    def next_fault(self) -> Fault | None:
        number = next(self.requests)
        if self.fault is None and self.every and number % self.every == 0:
            return FAULTS[number // self.every % len(FAULTS)]
        return self.fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gives up is what faults are for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _pass_on(self) -> None:
        body = self._body()
        if (status := self.server.refuse(self.command, self.path)) is not None:
            self.server.hits[str(status)] += 1
            self.send_response(status)
            for name, value in {"Content-Length": "0", **self.server.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        fault = self.server.next_fault()
        if fault is not None:
            self.server.hits[fault] += 1
            self.close_connection = True
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "stall":
            self.server.over.wait()
        else:
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        target = self.server.target
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        left_out = ("transfer-encoding", *self.server.dropped)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        if body or "Content-Length" in headers:
            headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on


@pytest.fixture
def fault_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """One that behaves until told otherwise."""
    proxy = FaultProxy(s3_server.endpoint)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        proxy.shutdown()
        proxy.server_close()
