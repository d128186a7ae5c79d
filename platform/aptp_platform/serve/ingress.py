"""The deployment that speaks HTTP: bodies become orders, pictures become answers, refusals become errors."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from aptp_platform.serve.args import ServeArgs
from aptp_platform.serve.calls import call, call_stream
from aptp_platform.serve.openai import (
    ImageRequest,
    RouteRequest,
    choice_json,
    error_body,
    images_response,
    models_response,
    parse_request,
    stream_event,
    to_order,
)
from aptp_platform.serve.orders import Catalog, Choice, ModelLoad, Order, Picture, Refusal

_PAGE: Final = Path(__file__).parent / "static" / "index.html"
_PAGE_POLICY: Final = "default-src 'self' 'unsafe-inline'; img-src 'self' data:"  # the page needs no other host
_READY_TIMEOUT_S: Final = 5.0


class Gateway(Protocol):
    """What the HTTP side needs of the rest: the router, however it is reached."""

    async def route(self, order: Order) -> Choice: ...

    async def generate(self, order: Order) -> tuple[Choice, list[Picture]]: ...

    def stream(self, order: Order) -> AsyncIterator[Choice | Picture]: ...

    async def loads(self) -> dict[str, ModelLoad]: ...


class RouterGateway:
    """The router's deployment. An order that was on a router replica that died is given to another one."""

    def __init__(self, handle: DeploymentHandle[Any], attempts: int) -> None:
        self._handle, self._attempts = handle, attempts

    async def route(self, order: Order) -> Choice:
        return await call(lambda: self._handle.route.remote(order), attempts=self._attempts)

    async def generate(self, order: Order) -> tuple[Choice, list[Picture]]:
        return await call(lambda: self._handle.generate.remote(order), attempts=self._attempts)

    def stream(self, order: Order) -> AsyncIterator[Choice | Picture]:
        streaming = self._handle.options(stream=True)
        return call_stream(lambda: streaming.stream.remote(order), attempts=self._attempts)

    async def loads(self) -> dict[str, ModelLoad]:
        return await call(lambda: self._handle.loads.remote(), attempts=self._attempts)


@serve.ingress()
class Ingress:
    """One HTTP replica."""

    def __init__(self, router: DeploymentHandle[Any], catalog: Catalog, args: ServeArgs) -> None:
        self._app = create_app(RouterGateway(router, args.router.attempts), catalog, args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def create_app(gateway: Gateway, catalog: Catalog, args: ServeArgs) -> FastAPI:
    """The HTTP side of a server. `x-request-id` is set by Ray Serve's proxy, on every response."""
    app = FastAPI(title="APTP", docs_url=None, redoc_url=None)
    started = int(time.time())

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        begun = time.monotonic()
        wanted = parse_request(ImageRequest, await _read_body(request, args))
        order = to_order(wanted, args.images, catalog, request.headers.get("x-request-id", ""))
        if wanted.stream:
            return await _streamed(gateway.stream(order), order, args.ingress.heartbeat_s)
        choice, pictures = await gateway.generate(order)
        return JSONResponse(images_response(order, choice, pictures, wanted), headers=_headers(choice, begun, pictures))

    @app.post("/v1/route")
    async def route(request: Request) -> Response:
        begun = time.monotonic()
        order = to_order(parse_request(RouteRequest, await _read_body(request, args)), args.images, catalog)
        choice = await gateway.route(order)
        return JSONResponse(choice_json(choice), headers=_headers(choice, begun))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(models_response(catalog, started))

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        for entry in models_response(catalog, started)["data"]:
            if entry["id"] == name:
                return JSONResponse(entry)
        raise Refusal(404, f"The model {name[:64]!r} does not exist.", code="model_not_found", param="model")

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        try:
            loads = await asyncio.wait_for(gateway.loads(), _READY_TIMEOUT_S)
        except TimeoutError:
            raise Refusal(503, "The router does not answer.", code="overloaded", retry_after_s=1.0) from None
        return JSONResponse(
            {
                "status": "ready",
                "release": catalog.release,
                "size": f"{catalog.size[0]}x{catalog.size[1]}",
                "models": {name: asdict(load) for name, load in loads.items()},
            }
        )

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": _PAGE_POLICY})

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return _error(refusal)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        code = "unknown_url" if error.status_code == 404 else None
        message = f"{error.detail}: {request.method} {request.url.path[:128]}"
        return JSONResponse(error_body(error.status_code, message, code), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _error(Refusal(500, "The server failed at this request; its log says why.", code="server_error"))

    return app


async def _read_body(request: Request, args: ServeArgs) -> bytes:
    """The body, if it is JSON of a bearable size and arrives in time."""
    limit = args.ingress.max_body_bytes
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            415, f"The body's content type is {kind[:64]!r}; send application/json.", code="unsupported_media_type"
        )
    too_large = Refusal(413, f"The body is larger than {limit} bytes.", code="request_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(args.ingress.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        message = f"The body did not arrive within {args.ingress.body_timeout_s:g} s."
        raise Refusal(408, message, code="request_timeout", retry=False) from None
    return bytes(body)


async def _streamed(items: AsyncIterator[Choice | Picture], order: Order, heartbeat_s: float) -> Response:
    """Server-sent events. The choice is awaited first: until then an error still has a status of its own."""
    begun = time.monotonic()
    choice = await anext(items)
    assert isinstance(choice, Choice)

    async def events() -> AsyncIterator[str]:
        following = asyncio.ensure_future(anext(items))
        try:
            while True:
                done, _ = await asyncio.wait((following,), timeout=heartbeat_s)
                if not done:
                    yield ": ping\n\n"
                    continue
                picture = following.result()
                assert isinstance(picture, Picture)
                name, data = stream_event(order, picture)
                if picture.preview is None:
                    data["aptp"] = choice_json(choice)
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
                if picture.preview is None:
                    return
                following = asyncio.ensure_future(anext(items))
        except Refusal as refusal:
            body = error_body(refusal.status, refusal.message, refusal.code, refusal.param)
            yield f"event: error\ndata: {json.dumps(body)}\n\n"
        finally:
            following.cancel()

    headers = {**_headers(choice, begun), "cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _headers(choice: Choice, begun: float, pictures: list[Picture] | None = None) -> dict[str, str]:
    """How the order was served, on every answer."""
    total_ms = 1e3 * (time.monotonic() - begun)
    headers = {
        "x-aptp-code": choice.model,
        "x-aptp-routed-code": choice.routed,
        "x-aptp-reason": choice.reason,
        "x-aptp-macs-ratio": f"{choice.ratio:.4f}",
        "x-aptp-margin": f"{choice.margin:.4f}",
        "x-aptp-ms": f"{total_ms:.1f}",
        "openai-processing-ms": f"{total_ms:.0f}",
    }
    if pictures:
        queue, denoise = (max(getattr(each, name) for each in pictures) for name in ("queue_ms", "denoise_ms"))
        headers["server-timing"] = f"queue;dur={queue:.1f}, denoise;dur={denoise:.1f}, total;dur={total_ms:.1f}"
    return headers


def _error(refusal: Refusal) -> Response:
    headers = {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(refusal.retry_after_s))
    if refusal.retry is not None:
        headers["x-should-retry"] = str(refusal.retry).lower()
    body = error_body(refusal.status, refusal.message, refusal.code, refusal.param)
    return JSONResponse(body, refusal.status, headers)
