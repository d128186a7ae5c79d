"""The deployment that speaks HTTP: bodies become requests, images and errors become answers."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from aptp_platform.serve.args import ServeArgs
from aptp_platform.serve.http.connections import CALLBACK, LIMITS, limited
from aptp_platform.serve.http.gateway import Gateway, RouterGateway
from aptp_platform.serve.http.keys import ApiKey, ApiKeyAuth
from aptp_platform.serve.http.links import PATH, ImageLinks
from aptp_platform.serve.http.metrics import IngressMetrics
from aptp_platform.serve.http.paths import LenientPaths
from aptp_platform.serve.http.streams import in_time, open_stream
from aptp_platform.serve.http.wire.fields import (
    EditRequest,
    ImageRequest,
    RouteRequest,
    VariationRequest,
    parse_body,
    parse_fields,
)
from aptp_platform.serve.http.wire.openai import (
    adaptations,
    choice_json,
    data_url,
    error_body,
    images_response,
    models_response,
    to_generation_request,
)
from aptp_platform.serve.http.wire.pictures import with_source
from aptp_platform.serve.http.wire.substitutes import model_of
from aptp_platform.serve.http.wire.upload import read_form, read_json
from aptp_platform.serve.messages import ApiError, Catalog, Choice, GenerationRequest, ImageResult, SourceImage
from aptp_platform.serve.replicas import ReplicaCounts

_PAGE: Final = Path(__file__).parent / "static" / "index.html"
_PAGE_POLICY: Final = "default-src 'self' 'unsafe-inline'; img-src 'self' data:"  # the page needs no other host
_READY_TIMEOUT_S: Final = 5.0
_LOG = logging.getLogger("ray.serve")
_TOLD: Final = (  # headers that a page of another origin may read
    "x-request-id", "retry-after", "server-timing", "openai-processing-ms", "x-aptp-code", "x-aptp-routed-code",
    "x-aptp-reason", "x-aptp-macs-ratio", "x-aptp-margin", "x-aptp-ms", "x-aptp-predicted-loss", "x-aptp-size",
    "x-aptp-ignored", "x-ratelimit-limit-macs", "x-ratelimit-remaining-macs", "x-ratelimit-reset-macs",
)  # fmt: skip


@serve.ingress()
class Ingress:
    """One HTTP replica."""

    def __init__(self, router: DeploymentHandle[Any], catalog: Catalog, args: ServeArgs) -> None:
        context = serve.get_replica_context()
        peers = ReplicaCounts({"ingress": context.deployment}, args.router.status_s)

        def share() -> float:
            peers.follow()
            return 1 / max(1, peers.counts.get("ingress", 1))

        loopback = _listens_on_loopback()
        if not loopback and not limited(os.environ):
            _LOG.warning(
                "anyone who reaches this server can stop it with one endless header: set %s=%s before `ray start`, or "
                "put a reverse proxy with limits in front", CALLBACK, LIMITS,
            )  # fmt: skip
        auth = ApiKeyAuth(args.keys, os.environ, listens_on_loopback=loopback, share=share)
        self._app = create_app(RouterGateway(router, args), catalog, args, auth)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def _listens_on_loopback() -> bool:
    """Whether Serve's proxies take connections of their own machine only. Serve tells it to no public function."""
    client = _get_global_client()
    assert client is not None  # a replica runs, so the controller does
    host = client.http_config.host
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:  # a name that may be anything, or no host at all
        return False


@dataclass(frozen=True)
class Order:
    """A request as it is understood. told: headers that say what differs from what was asked. begun: by the monotonic
    clock."""

    body: Any
    generation: GenerationRequest
    told: dict[str, str]
    begun: float


def create_app(gateway: Gateway, catalog: Catalog, args: ServeArgs, auth: ApiKeyAuth) -> FastAPI:
    """The HTTP side of a server. `x-request-id` is set by Ray Serve's proxy, on every response."""
    app = FastAPI(title="APTP", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(LenientPaths)
    if args.ingress.cors_origins:  # before the keys: a browser asks without one what it may send
        app.add_middleware(
            CORSMiddleware,
            allow_origins=args.ingress.cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=_TOLD,
        )
    started = int(time.time())
    metrics = IngressMetrics()
    shared = args.links.folder is not None or args.ingress.scaling.max_replicas == 1
    links = ImageLinks(args.links, args.storage) if shared else None

    async def admitted(request: Request) -> None:
        """Before the body is read: who has no key is not listened to."""
        request.state.begun = time.monotonic()
        request.state.key = await auth.admit(request.headers.get("authorization"))

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(admitted)])

    ignore_unknown = args.images.other_fields == "ignore"

    def order(request: Request, body: Any, unknown: list[str], source: SourceImage | None = None) -> Order:
        """What is to be made of a body, and the headers that say what that differs in."""
        key: ApiKey | None = request.state.key
        request_id, caller = request.headers.get("x-request-id", ""), key.name if key else ""
        generation = to_generation_request(body, args.images, catalog, request_id, caller)
        told = adaptations(body, unknown, args.images, catalog)
        return Order(body, replace(generation, source=source), told, request.state.begun)

    async def order_of(request: Request, model: type[RouteRequest]) -> Order:
        return order(request, *parse_body(model, await read_json(request, args.ingress), ignore_unknown=ignore_unknown))

    async def edit_of(request: Request, model: type[EditRequest]) -> Order:
        """The same of a form with pictures."""
        form = await read_form(request, args.ingress)
        body, unknown = parse_fields(model, form.fields, ignore_unknown=ignore_unknown)
        unknown += [name for name, files in form.files.items() if name not in ("image", "mask") or len(files) > 1]
        return order(request, *await asyncio.to_thread(with_source, body, unknown, form, args.images, catalog))

    async def urls_of(request: Request, generation: GenerationRequest, images: list[ImageResult]) -> list[str]:
        if links is None:
            return [data_url(generation, image) for image in images]
        reached_at = _reached_at(request)
        return [await links.add(image.data, generation.output_format, reached_at) for image in images]

    async def drawn(request: Request, order: Order) -> Response:
        body, generation = order.body, order.generation
        with auth.charged(request.state.key, catalog.most_macs(generation)) as charge:
            if body.stream:
                choice, events = await open_stream(gateway.stream(generation), generation, args.ingress)
                answer: Response = StreamingResponse(events, media_type="text/event-stream")
                answer.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
                answer.headers.update(_headers(choice, order.begun))
            else:
                async with in_time(generation, args.ingress):
                    choice, images = await gateway.generate(generation)
                urls = await urls_of(request, generation, images) if body.wants_urls else None
                answer = JSONResponse(images_response(generation, choice, images, urls))
                answer.headers.update(_headers(choice, order.begun, images))
            charge.correct(catalog.macs_of(generation, choice.macs))
        answer.headers.update(order.told | auth.headers(request.state.key))
        return answer

    @v1.post("/images/generations")
    async def generate(request: Request) -> Response:
        return await drawn(request, await order_of(request, ImageRequest))

    @v1.post("/images/edits")
    async def edit(request: Request) -> Response:
        return await drawn(request, await edit_of(request, EditRequest))

    @v1.post("/images/variations")
    async def vary(request: Request) -> Response:
        return await drawn(request, await edit_of(request, VariationRequest))

    @v1.post("/route")
    async def route(request: Request) -> Response:
        order = await order_of(request, RouteRequest)
        with auth.charged(request.state.key, catalog.route_macs):
            async with in_time(order.generation, args.ingress):
                choice = await gateway.route(order.generation)
        headers = _headers(choice, order.begun) | order.told | auth.headers(request.state.key)
        return JSONResponse(choice_json(choice), headers=headers)

    @v1.get("/map")
    async def code_map() -> Response:
        return JSONResponse(asdict(await gateway.code_map()))

    @v1.get("/models")
    async def models() -> Response:
        return JSONResponse(models_response(catalog, started))

    @v1.get("/models/{name:path}")
    async def model(name: str) -> Response:
        served = model_of(name, args.images, catalog)
        (entry,) = (each for each in models_response(catalog, started)["data"] if each["id"] == served)
        return JSONResponse({**entry, "id": name})

    app.include_router(v1)

    @app.get(f"{PATH}/{{name}}")
    async def image(name: str) -> Response:
        """Whoever was told the name may fetch it: a browser's `img` sends no key."""
        if links is None:
            raise ApiError(404, "This server keeps no images.", code="image_not_found")
        data, kind = await links.read(name)
        headers = {"cache-control": "private", "x-content-type-options": "nosniff"}
        return Response(data, media_type=kind, headers=headers)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        try:
            loads = await asyncio.wait_for(gateway.loads(), _READY_TIMEOUT_S)
        except TimeoutError:
            raise ApiError(503, "The router does not answer.", code="overloaded", retry_after_s=1.0) from None
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

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        metrics.refused(error.code or str(error.status))
        answer = _error(error)
        answer.headers.update(auth.headers(getattr(request.state, "key", None)))
        return answer

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        allowed = (error.headers or {}).get("Allow")
        if request.method == "OPTIONS" and error.status_code == 405 and allowed:
            return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
        code = "unknown_url" if error.status_code == 404 else None
        message = f"{error.detail}: {request.method} {request.url.path[:128]}"
        return JSONResponse(error_body(error.status_code, message, code), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        metrics.refused("server_error")
        return _error(ApiError(500, "The server failed at this request; its log says why.", code="server_error"))

    return app


def _reached_at(request: Request) -> str:
    """Scheme and host as the client sees them, also behind a proxy that ends TLS."""
    scheme = request.headers.get("x-forwarded-proto", "")
    scheme = scheme if scheme in ("http", "https") else request.url.scheme
    return f"{scheme}://{request.headers.get('host', request.url.netloc)}"


def _headers(choice: Choice, begun: float, images: list[ImageResult] | None = None) -> dict[str, str]:
    """How the request was served, on every answer."""
    total_ms = 1e3 * (time.monotonic() - begun)
    headers = {
        "x-aptp-code": choice.model,
        "x-aptp-routed-code": choice.routed,
        "x-aptp-reason": choice.reason,
        "x-aptp-macs-ratio": f"{choice.ratio:.4f}",
        "x-aptp-margin": f"{choice.margin:.4g}",
        "x-aptp-ms": f"{total_ms:.1f}",
        "openai-processing-ms": f"{total_ms:.0f}",
    }
    if choice.predicted_loss is not None:
        headers["x-aptp-predicted-loss"] = f"{choice.predicted_loss:.4g}"
    if images:
        queue, denoise = (max(getattr(each, name) for each in images) for name in ("queue_ms", "denoise_ms"))
        headers["server-timing"] = f"queue;dur={queue:.1f}, denoise;dur={denoise:.1f}, total;dur={total_ms:.1f}"
    return headers


def _error(error: ApiError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.retry is not None:
        headers["x-should-retry"] = str(error.retry).lower()
    body = error_body(error.status, error.message, error.code, error.param)
    return JSONResponse(body, error.status, headers)
