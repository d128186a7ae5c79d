"""A request is made again as long as the next answer may be another one; a refusal says why, in the server's words."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest
from botocore.exceptions import (
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)

from aptp_platform.config import StorageConfig
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import Store
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import S3Server

VERBS: dict[str, Callable[[Store], object]] = {
    "HEAD": lambda store: store.version("a"),
    "GET": lambda store: store.read_bytes("a"),
    "LIST": lambda store: store.list("*"),
    "PUT": lambda store: store.write_json("b", 1),
    "DELETE": lambda store: store.remove("c"),
}


def test_an_answer_that_passes_is_asked_again_whatever_the_request(fault_proxy: FaultProxy) -> None:
    bucket = S3Server(fault_proxy.endpoint).bucket("passing")
    store = Store.open(bucket, StorageConfig(endpoint=fault_proxy.endpoint))
    for name in "ac":
        store.write_json(name, 0)
    asked: list[str] = []

    def first(method: str, path: str) -> int | None:
        asked.append(f"{method} {path}")
        return 429 if asked.count(asked[-1]) == 1 else None

    fault_proxy.refuse = first
    for verb, request in VERBS.items():
        asked.clear()
        fault_proxy.hits.clear()
        request(store)
        assert fault_proxy.hits["429"] == len(set(asked)) > 0, verb


def test_which_answers_pass() -> None:
    filesystem = Store.open("s3://b", StorageConfig(endpoint="http://127.0.0.1:9"))._fs
    for status in range(300, 600):
        answer = SimpleNamespace(status_code=status, headers={}), {"Error": {"Code": str(status)}}
        pause = filesystem._pause(1, SimpleNamespace(name="HeadObject"), {"headers": {}}, answer)
        passes = status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
        assert (asyncio.run(pause) is not None) == passes, status
    failures = {
        EndpointConnectionError(endpoint_url="u"): True, ConnectTimeoutError(endpoint_url="u"): True,
        ReadTimeoutError(endpoint_url="u"): True, ConnectionClosedError(endpoint_url="u"): True,
        NoCredentialsError(): False,
    }  # fmt: skip
    for failure, passes in failures.items():
        pause = filesystem._pause(1, SimpleNamespace(name="HeadObject"), {"headers": {}}, None, failure)
        assert (asyncio.run(pause) is not None) == passes, failure


def test_the_pauses_of_a_request_outlast_most_of_a_minute() -> None:
    config = StorageConfig(endpoint="http://127.0.0.1:9")
    filesystem, answer = Store.open("s3://b", config)._fs, SimpleNamespace(status_code=503, headers={})
    operation = SimpleNamespace(name="HeadObject")
    pauses = [
        asyncio.run(filesystem._pause(attempt, operation, {"headers": {}}, (answer, {})))
        for attempt in range(1, config.attempts + 1)
    ]
    assert pauses.pop() is None, "the last attempt"
    assert sum(pauses) > 55


def test_a_server_that_asks_for_a_pause_gets_it_and_one_that_does_not_come_back_is_given_up(
    fault_proxy: FaultProxy,
) -> None:
    store = Store.open(S3Server(fault_proxy.endpoint).bucket("paused"), StorageConfig(endpoint=fault_proxy.endpoint))
    store.write_json("a", 0)
    for as_date in (False, True):
        left = [429]
        fault_proxy.headers = {"Retry-After": formatdate(time.time() + 3, usegmt=True) if as_date else "2"}
        fault_proxy.refuse = lambda method, path, left=left: left.pop() if left else None  # type: ignore[misc]
        began = time.monotonic()
        store.read_bytes("a")
        assert 1.0 < time.monotonic() - began < 10
    fault_proxy.headers = {}
    twice = Store(store.uri, StorageConfig(endpoint=fault_proxy.endpoint, attempts=2))
    fault_proxy.refuse = lambda method, path: 429
    fault_proxy.hits.clear()
    with pytest.raises(StoreError, match=r"s3://paused/a: not reachable at .* \(429: "):
        twice.read_bytes("a")
    assert fault_proxy.hits["429"] == 2


class Words(BaseHTTPRequestHandler):
    """Answers every request with one status and, unless it is HEAD, with one body."""

    protocol_version = "HTTP/1.1"
    status, body = 403, ""
    date: str | None = None
    seen: ClassVar[list[str]] = []

    def _answer(self) -> None:
        self.seen.append(self.command)
        self.send_response_only(self.status)
        self.send_header("Date", self.date or formatdate(usegmt=True))
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    do_GET = do_PUT = do_HEAD = do_DELETE = _answer


@pytest.fixture(scope="module")
def worded() -> Iterator[Store]:
    """A bucket of a server that always answers as `answer` says."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Words)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Store.open("s3://b", StorageConfig(endpoint=f"http://127.0.0.1:{server.server_port}", attempts=3))
    finally:
        server.shutdown()
        server.server_close()


def answer(status: int, body: str, date: str | None = None) -> None:
    Words.status, Words.body, Words.date = status, body, date
    Words.seen.clear()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
        (400, "ExpiredToken", "The provided token has expired."),
        (403, "InvalidAccessKeyId", "The key does not exist in our records."),
        (301, "PermanentRedirect", "The bucket must be addressed using another endpoint."),
    ],
)
def test_a_refusal_is_told_in_the_server_s_words_on_paths_that_only_ask_too(
    worded: Store, status: int, code: str, words: str
) -> None:
    answer(status, f"<Error><Code>{code}</Code><Message>{words}</Message></Error>")
    with pytest.raises(StoreError, match=f"{code}: {words}"):
        worded.version("a")


def test_a_clock_that_is_off_is_tried_once_more(worded: Store) -> None:
    late = formatdate(time.time() - 7200, usegmt=True)
    answer(403, "<Error><Code>RequestTimeTooSkewed</Code><Message>too large</Message></Error>", late)
    with pytest.raises(StoreError, match="RequestTimeTooSkewed: too large"):
        worded.version("a")
    assert Words.seen.count("HEAD") == 2
    answer(403, "")
    with pytest.raises(StoreError, match="access denied"):
        worded.version("a")
    assert Words.seen.count("HEAD") == 1, "the clock is right"


@pytest.mark.parametrize("body", ["", "<html>sign in</html>"])
def test_a_listing_without_content_is_no_empty_one(worded: Store, body: str) -> None:
    answer(200, body)
    with pytest.raises(StoreError, match="EmptyAnswer: ListObjectsV2 was answered with 200 and no content"):
        worded.list()
    assert len(Words.seen) == worded.config.attempts
