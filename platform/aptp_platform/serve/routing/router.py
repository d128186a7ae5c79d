"""The deployment between ingress and experts: encodes prompts in batches and selects each request's model."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from aptp.release import Release
from aptp.router import Router as PromptRouter
from aptp_platform.serve.args import ServeArgs
from aptp_platform.serve.messages import (
    TEACHER,
    Accepted,
    ApiError,
    Catalog,
    Choice,
    CodeMap,
    GenerationRequest,
    ImageResult,
    ModelLoad,
)
from aptp_platform.serve.release_source import ReleaseSource
from aptp_platform.serve.replicas import ReplicaCounts
from aptp_platform.serve.retries import call, call_stream
from aptp_platform.serve.routing.decision_log import DecisionLog
from aptp_platform.serve.routing.drift import DriftMonitor
from aptp_platform.serve.routing.metrics import RouterMetrics
from aptp_platform.serve.routing.prompt_cache import RoutingCache, score_prompts
from aptp_platform.serve.routing.routing_map import code_map
from aptp_platform.serve.routing.selection import STANDS_IN_FOR_COLD, Situation, decide

_SMOOTHING: Final = 0.2  # weight of the newest image in a model's mean step time
_OTHER_REPLICA_S: Final = 1.0  # in which a model's replica of this release is found, if there is one
_MAX_RETRY_AFTER_S: Final = 60.0  # clients give up above two minutes


def load_prompt_router(release: Release) -> PromptRouter:
    """The release's router with its encoder, ready to answer on a CPU."""
    router = PromptRouter.load(release.router_path)
    assert router.encoder is not None  # a release without one is not published
    return router


class Router:
    """One replica of the router; several share the work, each with its own view of the load."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        source: ReleaseSource,
        catalog: Catalog,
        args: ServeArgs,
        experts: Mapping[str, DeploymentHandle[Any]],
        deployments: Mapping[str, str],
        batch_bounds: Mapping[str, int],
    ) -> None:
        torch.set_num_threads(args.router.num_threads or max(1, int(args.router.num_cpus)))
        self._catalog, self._args, self._experts, self._batch_sizes = catalog, args.router, experts, dict(batch_bounds)
        self._prompts = load_prompt_router(source.for_router())
        self._score = RoutingCache(lambda prompts: score_prompts(self._prompts, prompts, catalog.familiar))
        self._running: Counter[str] = Counter()  # images of each model
        self._steps: Counter[str] = Counter()  # denoising steps of those images
        self._step_ms: dict[str, float] = {}
        self._metrics, self._decisions = RouterMetrics(), DecisionLog(args.decisions, catalog)
        self._replicas = ReplicaCounts(deployments, args.router.status_s)
        self._waking: dict[str, asyncio.Future[Any]] = {}
        self._code_indices = {code.name: index for index, code in enumerate(catalog.codes)}
        self._drift = DriftMonitor([code.share or 0.0 for code in catalog.codes])
        self._batch_limits: dict[str, int] = {}
        self._samples = args.page.prompts
        self._map: CodeMap | None = None
        await self._wait_for_release(args)
        batched: Any = self._decide
        batched.set_max_batch_size(args.router.max_batch_size)
        batched.set_batch_wait_timeout_s(args.router.batch_wait_s)

    async def _wait_for_release(self, args: ServeArgs) -> None:
        """Until every model that is kept awake runs in this release, for some time: before, this replica could serve
        nobody, and while a release is rolled out it would take the place of one that can."""
        scaling = {model: args.expert(index).scaling for index, model in enumerate(self._code_indices)}
        if args.teacher_args is not None:
            scaling[TEACHER] = args.teacher_args.scaling
        awake = [self._experts[model] for model, each in scaling.items() if each.min_replicas]
        calls = (self._wake_call(handle, patience_s=args.drain_s) for handle in awake)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), args.drain_s)

    async def _wake_call(self, handle: DeploymentHandle[Any], patience_s: float) -> None:
        await call(lambda: handle.wake.remote(self._catalog.release), attempts=1, patience_s=patience_s)

    async def route(self, request: GenerationRequest) -> Choice | ApiError:
        """The model that the request would go to now; nothing is started for it."""
        return await self._decide(request)

    async def generate(self, request: GenerationRequest) -> tuple[Choice, list[ImageResult]] | ApiError:
        """The request's images, one per seed; or why there are none."""
        try:
            choice = await self._choice(request)
            with self._accounted(request, choice):
                return choice, await self._images(request, choice)
        except ApiError as refusal:
            return refusal

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Choice | ImageResult | ApiError]:
        """The choice, as soon as its model has accepted the request; previews; the image of the first seed. A refusal
        ends it."""
        try:
            choice = await self._choice(request)
            with self._accounted(request, choice):
                async for item in self._streamed(request, choice):
                    yield item
        except ApiError as refusal:
            yield refusal

    async def loads(self) -> dict[str, ModelLoad]:
        """Every model's load as this replica sees it."""
        self._replicas.follow()
        return {
            model.name: ModelLoad(
                self._running[model.name],
                self._step_ms.get(model.name),
                self._replicas.counts.get(model.name),
                self._batch_limits.get(model.name),
                self._steps[model.name],
            )
            for model in self._catalog.models
        }

    async def code_map(self) -> CodeMap:
        """The codes and the sample prompts of the page."""
        if self._map is None:
            self._map = await asyncio.to_thread(code_map, self._prompts, self._samples)
        return self._map

    async def _choice(self, request: GenerationRequest) -> Choice:
        """The model that the request goes to; a sleeping one that others stand in for is woken."""
        choice = await self._decide(request)
        if isinstance(choice, ApiError):
            raise choice
        if choice.reason in STANDS_IN_FOR_COLD:
            self._wake(choice.routed)
        return choice

    async def _images(self, request: GenerationRequest, choice: Choice) -> list[ImageResult]:
        if len(request.seeds) == 1:
            return [await self._image(request, choice, request.seeds[0])]
        tasks = [asyncio.ensure_future(self._image(request, choice, seed)) for seed in request.seeds]
        try:
            return await asyncio.gather(*tasks)
        finally:  # after a failure nobody wants the others
            for task in tasks:
                task.cancel()

    async def _streamed(self, request: GenerationRequest, choice: Choice) -> AsyncIterator[Choice | ImageResult]:
        handle = self._experts[choice.model].options(stream=True)
        async for item in call_stream(
            lambda: handle.stream.remote(request, request.seeds[0], self._catalog.release),
            attempts=self._args.attempts,
            drain_s=self._drain_s(choice.model),
            patience_s=_OTHER_REPLICA_S,
        ):
            if isinstance(item, Accepted):
                yield choice
                continue
            if item.preview is None:
                self._learn(request, choice, item)
            yield item

    async def _image(self, request: GenerationRequest, choice: Choice, seed: int) -> ImageResult:
        handle = self._experts[choice.model]
        image: ImageResult = await call(
            lambda: handle.generate.remote(request, seed, self._catalog.release),
            attempts=self._args.attempts,
            drain_s=self._drain_s(choice.model),
            patience_s=_OTHER_REPLICA_S,
        )
        self._learn(request, choice, image)
        return image

    def _learn(self, request: GenerationRequest, choice: Choice, image: ImageResult) -> None:
        step_ms = image.denoise_ms / request.steps
        known = self._step_ms.setdefault(choice.model, step_ms)
        self._step_ms[choice.model] = known + _SMOOTHING * (step_ms - known)
        self._batch_limits[choice.model] = self._batch_sizes[choice.model] = image.batch_limit
        self._metrics.made(choice, image, self._catalog.macs_of(request, choice.macs) / len(request.seeds))

    def _drain_s(self, model: str) -> float:
        """Seconds until the images now requested of this model should be done."""
        steps_ms = self._steps[model] * self._step_ms.get(model, 0.0)
        return min(max(1.0, steps_ms / self._batch_sizes[model] / 1e3), _MAX_RETRY_AFTER_S)

    @contextmanager
    def _accounted(self, request: GenerationRequest, choice: Choice) -> Iterator[None]:
        """Counts a request while it runs, and says how it ended."""
        model, images, started = choice.model, len(request.seeds), time.monotonic()
        self._running[model] += images
        self._steps[model] += images * request.steps
        drift = self._drift.observe(self._code_indices[choice.routed], unknown=bool(choice.unknown))
        self._metrics.routed(choice, drift)
        outcome = "failed"
        try:
            yield
            outcome = "ok"
        except ApiError:
            outcome = "refused"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            self._running[model] -= images
            self._steps[model] -= images * request.steps
            seconds = time.monotonic() - started
            self._metrics.ended(choice, outcome, seconds)
            self._decisions.write(request, choice, outcome, seconds)

    @serve.batch  # type: ignore[untyped-decorator, unused-ignore]
    async def _decide(self, requests: list[GenerationRequest]) -> list[Choice | ApiError]:
        scores = await self._score([request.prompt for request in requests])
        loads = await self.loads()
        situation = Situation(self._catalog, self._batch_sizes, loads, self._args.target_ms)
        return decide(requests, scores, situation)

    def _wake(self, model: str) -> None:
        """Starts a replica of a code that has none, while others stand in for it."""

        async def wake() -> None:
            with suppress(ApiError):
                await self._wake_call(self._experts[model], patience_s=0.0)
            del self._waking[model]

        if model not in self._waking:
            self._waking[model] = asyncio.ensure_future(wake())
