"""The deployment between ingress and experts: encodes prompts in batches, picks each order's model, sees it through."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from aptp.router import Router as PromptRouter
from aptp_platform.serve.args import RouterArgs
from aptp_platform.serve.calls import call, call_stream
from aptp_platform.serve.orders import Accepted, Catalog, Choice, ModelLoad, Order, Picture
from aptp_platform.serve.released import ReleaseSource
from aptp_platform.serve.selection import Situation, choose

_SMOOTHING: Final = 0.2  # weight of the newest image in a model's mean step time
_MAX_RETRY_AFTER_S: Final = 60.0  # clients give up above two minutes


class Router:
    """One replica of the router; several share the work, each with its own view of the load."""

    def __init__(
        self,
        source: ReleaseSource,
        catalog: Catalog,
        args: RouterArgs,
        experts: Mapping[str, DeploymentHandle[Any]],
        batch_sizes: Mapping[str, int],
    ) -> None:
        torch.set_num_threads(args.num_threads or max(1, int(args.num_cpus)))
        self._catalog, self._args, self._experts, self._batch_sizes = catalog, args, experts, batch_sizes
        self._prompts = PromptRouter.load(source.for_router().router_path)
        self._running: Counter[str] = Counter()  # images of each model
        self._steps: Counter[str] = Counter()  # denoising steps of those images
        self._step_ms: dict[str, float] = {}
        batched: Any = self._similarities
        batched.set_max_batch_size(args.max_batch_size)
        batched.set_batch_wait_timeout_s(args.batch_wait_s)

    async def route(self, order: Order) -> Choice:
        """The model that the order would go to now."""
        similarities = await self._similarities(order.prompt)
        return choose(order, similarities, Situation(self._catalog, self._batch_sizes, await self.loads()))

    async def generate(self, order: Order) -> tuple[Choice, list[Picture]]:
        """The order's images, one a seed."""
        choice = await self.route(order)
        with self._counted(choice.model, order):
            tasks = [asyncio.ensure_future(self._picture(choice.model, order, seed)) for seed in order.seeds]
            try:
                pictures = await asyncio.gather(*tasks)
            finally:  # after a failure nobody wants the others
                for task in tasks:
                    task.cancel()
        return choice, pictures

    async def stream(self, order: Order) -> AsyncIterator[Choice | Picture]:
        """The choice, as soon as its model has accepted the order; previews; the image of the first seed."""
        choice = await self.route(order)
        handle = self._experts[choice.model].options(stream=True)
        with self._counted(choice.model, order):
            async for item in call_stream(
                lambda: handle.stream.remote(order, order.seeds[0]),
                attempts=self._args.attempts,
                drain_s=self._drain_s(choice.model),
            ):
                yield choice if isinstance(item, Accepted) else self._timed(choice.model, order, item)

    async def loads(self) -> dict[str, ModelLoad]:
        """Every model's load as this replica sees it."""
        return {
            model.name: ModelLoad(self._running[model.name], self._step_ms.get(model.name))
            for model in self._catalog.models
        }

    async def _picture(self, model: str, order: Order, seed: int) -> Picture:
        handle = self._experts[model]
        picture = await call(
            lambda: handle.generate.remote(order, seed), attempts=self._args.attempts, drain_s=self._drain_s(model)
        )
        return self._timed(model, order, picture)

    def _timed(self, model: str, order: Order, picture: Picture) -> Picture:
        if picture.preview is None:
            step_ms = picture.denoise_ms / order.num_inference_steps
            known = self._step_ms.setdefault(model, step_ms)
            self._step_ms[model] = known + _SMOOTHING * (step_ms - known)
        return picture

    def _drain_s(self, model: str) -> float:
        """Seconds until the images that are ordered of this model now should be done."""
        steps_ms = self._steps[model] * self._step_ms.get(model, 0.0)
        return min(max(1.0, steps_ms / self._batch_sizes[model] / 1e3), _MAX_RETRY_AFTER_S)

    @contextmanager
    def _counted(self, model: str, order: Order) -> Iterator[None]:
        images = len(order.seeds)
        self._running[model] += images
        self._steps[model] += images * order.num_inference_steps
        try:
            yield
        finally:
            self._running[model] -= images
            self._steps[model] -= images * order.num_inference_steps

    @serve.batch  # type: ignore[untyped-decorator, unused-ignore]
    async def _similarities(self, prompts: list[str]) -> list[tuple[float, ...]]:
        routes = await asyncio.to_thread(self._prompts.route, prompts)
        return [tuple(row) for row in routes.similarities.tolist()]
