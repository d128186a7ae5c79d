"""The router as the HTTP side sees it, however it is reached."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from aptp_platform.serve.args import ServeArgs
from aptp_platform.serve.messages import Choice, CodeMap, GenerationRequest, ImageResult, ModelLoad
from aptp_platform.serve.retries import call, call_stream


class Gateway(Protocol):
    """What the HTTP side needs of the rest: the router, however it is reached."""

    async def route(self, request: GenerationRequest) -> Choice: ...

    async def generate(self, request: GenerationRequest) -> tuple[Choice, list[ImageResult]]: ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[Choice | ImageResult]: ...

    async def loads(self) -> dict[str, ModelLoad]: ...

    async def code_map(self) -> CodeMap: ...


class RouterGateway:
    """The router's deployment. A request goes to another replica when its own died, or reaches no expert of its
    release during a rollout."""

    def __init__(self, handle: DeploymentHandle[Any], args: ServeArgs) -> None:
        self._handle = handle
        self._again: dict[str, Any] = {"attempts": args.router.attempts, "patience_s": args.drain_s}

    async def route(self, request: GenerationRequest) -> Choice:
        return await call(lambda: self._handle.route.remote(request), **self._again)

    async def generate(self, request: GenerationRequest) -> tuple[Choice, list[ImageResult]]:
        return await call(lambda: self._handle.generate.remote(request), **self._again)

    def stream(self, request: GenerationRequest) -> AsyncIterator[Choice | ImageResult]:
        streaming = self._handle.options(stream=True)
        return call_stream(lambda: streaming.stream.remote(request), **self._again)

    async def loads(self) -> dict[str, ModelLoad]:
        return await call(lambda: self._handle.loads.remote(), **self._again)

    async def code_map(self) -> CodeMap:
        return await call(lambda: self._handle.code_map.remote(), **self._again)
