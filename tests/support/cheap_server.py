"""The HTTP side of a server alone: its application in this process, before a router that makes nothing."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from aptp_platform.serve.args import KeyArgs, ServeArgs
from aptp_platform.serve.http.ingress import create_app
from aptp_platform.serve.http.keys import VARIABLE, ApiKeyAuth
from aptp_platform.serve.messages import (
    TEACHER,
    ApiError,
    Catalog,
    Choice,
    CodeMap,
    GenerationRequest,
    ImageResult,
    ModelFacts,
    ModelLoad,
    Prediction,
)

MODELS = (ModelFacts("code-00", 0.5, 5e8, 10, 1.0), ModelFacts(TEACHER, 1.0, 1e9, None, None))
CATALOG = Catalog("0123456789ab", (16, 16), MODELS)
PREDICTIONS = tuple(Prediction(model.name, model.ratio, model.macs, None) for model in MODELS)


class CheapGateway:
    """Sends every request to code-00, or refuses it, without making anything."""

    refuses = 0  # with this status

    async def route(self, request: GenerationRequest) -> Choice:
        if self.refuses:
            raise ApiError(self.refuses, "no", code="no")
        return Choice("code-00", "code-00", "routed", (1.0,), 0.0, (1.0,), PREDICTIONS, 0.5, 5e8)

    async def generate(self, request: GenerationRequest) -> tuple[Choice, list[ImageResult]]:
        return await self.route(request), [ImageResult(b"image", seed, 1, 0.0, 0.0, 1) for seed in request.seeds]

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Choice | ImageResult]:
        choice, images = await self.generate(request)
        yield choice
        yield images[0]

    async def loads(self) -> dict[str, ModelLoad]:
        return {}

    async def code_map(self) -> CodeMap:
        return CodeMap(((0.0, 0.0),), (), ((0.0,), (0.0,)), (0.0,))


def door(args: KeyArgs, entries: Any = (), *, loopback: bool = False) -> ApiKeyAuth:
    environment = {VARIABLE: json.dumps([entry.model_dump() for entry in entries])}
    return ApiKeyAuth(args, environment, listens_on_loopback=loopback)


def open_door() -> ApiKeyAuth:
    return door(KeyArgs(), loopback=True)


def answers(*calls: dict[str, Any], keeper: ApiKeyAuth | None = None, gateway: Any = None, **args: Any) -> Any:
    """Answers to calls, as keywords of httpx's `request`, one after the other. args: of the server."""

    async def main() -> list[httpx.Response]:
        settings = ServeArgs.model_validate({"release": "x", **args})
        app = create_app(gateway or CheapGateway(), CATALOG, settings, keeper or open_door())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return [await http.request(**{"method": "GET", **call}) for call in calls]

    return asyncio.run(main())
