"""A request is made again as long as the next answer may be another one; a refusal says why, in the server's words."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

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


@pytest.mark.parametrize("verb", VERBS)
def test_an_answer_that_passes_is_asked_again_whatever_the_request(fault_proxy: FaultProxy, verb: str) -> None:
    bucket = S3Server(fault_proxy.endpoint).bucket(f"passing-{verb.lower()}")
    store = Store.open(bucket, StorageConfig(endpoint=fault_proxy.endpoint))
    for name in "ac":
        store.write_json(name, 0)
    asked: list[str] = []

    def first(method: str, path: str) -> int | None:
        asked.append(f"{method} {path}")
        return 429 if asked.count(asked[-1]) == 1 else None

    fault_proxy.refuse = first
    VERBS[verb](store)
    assert fault_proxy.hits["429"] == len(set(asked)) > 0


def test_which_answers_pass() -> None:
    filesystem = Store.open("s3://b", StorageConfig(endpoint="http://127.0.0.1:9"))._fs
    for status in range(300, 600):
        answer = SimpleNamespace(status_code=status, headers={}), {"Error": {"Code": str(status)}}
        pause = filesystem._pause(1, SimpleNamespace(name="HeadObject"), {"headers": {}}, answer)
        passes = status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
        assert (asyncio.run(pause) is not None) == passes, status


def test_a_server_that_asks_for_a_pause_gets_it_and_one_that_does_not_come_back_is_given_up(
    fault_proxy: FaultProxy,
) -> None:
    store = Store.open(S3Server(fault_proxy.endpoint).bucket("paused"), StorageConfig(endpoint=fault_proxy.endpoint))
    for pause in ("2", formatdate(time.time() + 3, usegmt=True)):
        store.write_json("a", 0)
        left = [429]
        fault_proxy.headers = {"Retry-After": pause}
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
    status, body = 403, b""
    date: str | None = None
    seen: list[str]

    def _answer(self) -> None:
        self.seen.append(self.command)
        self.send_response_only(self.status)
        self.send_header("Date", self.date or formatdate(usegmt=True))
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    do_GET = do_PUT = do_HEAD = do_DELETE = _answer


@contextmanager
def answering(status: int, body: str, date: str | None = None) -> Iterator[tuple[list[str], Store]]:
    """What is asked of a server that always answers like this, and a bucket of it."""
    seen: list[str] = []
    given = {"status": status, "body": body.encode(), "date": date, "seen": seen}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Given", (Words,), given))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    storage = StorageConfig(endpoint=f"http://127.0.0.1:{server.server_port}", attempts=3)
    try:
        yield seen, Store.open("s3://b", storage)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
        (400, "ExpiredToken", "The provided token has expired."),
        (403, "InvalidAccessKeyId", "The key does not exist in our records."),
        (301, "PermanentRedirect", "The bucket must be addressed using another endpoint."),
    ],
)
def test_a_refusal_is_told_in_the_server_s_words_on_paths_that_only_ask_too(status: int, code: str, words: str) -> None:
    body = f"<Error><Code>{code}</Code><Message>{words}</Message></Error>"
    with answering(status, body) as (_, store), pytest.raises(StoreError, match=f"{code}: {words}"):
        store.version("a")


def test_a_clock_that_is_off_is_tried_once_more() -> None:
    body = "<Error><Code>RequestTimeTooSkewed</Code><Message>too large</Message></Error>"
    late = formatdate(time.time() - 7200, usegmt=True)
    with (
        answering(403, body, late) as (seen, store),
        pytest.raises(StoreError, match="RequestTimeTooSkewed: too large"),
    ):
        store.version("a")
    assert seen.count("HEAD") == 2
    with answering(403, "") as (seen, store), pytest.raises(StoreError, match="access denied"):
        store.version("a")
    assert seen.count("HEAD") == 1, "the clock is right"


@pytest.mark.parametrize("body", ["", "<html>sign in</html>"])
def test_a_listing_without_content_is_no_empty_one(body: str) -> None:
    with answering(200, body) as (seen, store), pytest.raises(StoreError, match="not reachable"):
        store.list()
    assert len(seen) > 1
