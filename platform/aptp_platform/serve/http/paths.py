"""Methods and paths as clients and probes spell them: HEAD, OPTIONS, and a slash at the end."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class LenientPaths:
    """An ASGI application that answers HEAD as GET without the body, and `/v1/models/` as `/v1/models`.

    A redirect would do neither: clients lose their POST's body on one, and its address would come from the Host header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        bare = path.rstrip("/") or "/"
        head = scope["method"] == "HEAD"
        method = "GET" if head else scope["method"]

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        told = {**scope, "path": bare, "method": method}
        await self._app(told, receive, without_body if head else send)
