"""Limits on what a connection may send before it has asked for anything, in Serve's HTTP proxy.

The proxy's server (uvicorn) has none: one header without an end keeps it busy for all others. Serve calls
`limit_connections` when a proxy starts, if the variable that `CALLBACK` names is set to it before `ray start`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from aptp_platform.serve.http.wire.openai import error_body

CALLBACK: Final = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
LIMITS: Final = f"{__name__}:limit_connections"
_MAX_HEAD_BYTES: Final = 65_536  # of request line and headers, or between two pieces of a body
_MAX_HEADERS: Final = 100
_HEAD_S: Final = 10.0  # from a request's first byte, or the connection's begin, to the end of its headers
_PIECE: Final = 16_384  # bytes parsed at once: so much later at most the limits are noticed


def limit_connections() -> list[Middleware]:
    """Makes `LimitedHttp` this process's HTTP/1.1; called by Serve, which wants middlewares."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{LimitedHttp.__name__}"
    return []


def limited(environment: Mapping[str, str]) -> bool:
    """Whether the proxies of a node with this environment have limits: these, or HAProxy's."""
    return environment.get(CALLBACK) == LIMITS or environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


class _TooMuchError(Exception):
    pass


class LimitedHttp(HttpToolsProtocol):
    """A connection whose headers are few, short and prompt; else it gets a 431 or a 408 and is closed.

    uvicorn has no place for such limits but its protocol class; this one overrides what its parser calls.
    """

    _unfinished = 0  # bytes since the parser last finished something
    _alarm: asyncio.TimerHandle | None = None
    _too_much = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_alarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_alarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            if self.transport.is_closing():
                return
            piece = data[start : start + _PIECE]
            self._unfinished += len(piece)
            super().data_received(piece)
            if self._unfinished > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, f"The headers are larger than {_MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._set_alarm()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= _MAX_HEADERS:
            self._too_much = True
            raise _TooMuchError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unfinished = 0
        self._clear_alarm()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unfinished = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._too_much:
            self._refuse(431, f"There are more than {_MAX_HEADERS} headers.")
        else:
            self._refuse(400, msg)

    def _set_alarm(self) -> None:
        if self._alarm is None:
            self._alarm = self.loop.call_later(_HEAD_S, self._too_slow)

    def _clear_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, f"The headers did not arrive within {_HEAD_S:g} s.")

    def _refuse(self, status: int, message: str) -> None:
        """The last words on this connection."""
        codes: dict[int, Any] = {408: "request_timeout", 431: "headers_too_large"}
        body = json.dumps(error_body(status, message, codes.get(status, "invalid_http"))).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
