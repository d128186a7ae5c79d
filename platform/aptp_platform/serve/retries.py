"""Calls from one deployment to another: retried when a replica died, an `ApiError` when there is no room.

A callee returns (or yields) its `ApiError`: what is raised in a replica, Serve logs with its traceback, and any client
can have itself refused. The one place that knows Ray's exceptions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from aptp_platform.serve.messages import RELEASE_CHANGING, ApiError

Lost = (RayActorError, ReplicaUnavailableError)  # the replica died, or cannot be reached: nobody runs the call any more
_PAUSE_S: Final = 0.2  # for the handle to learn which replicas are left


async def call(make: Callable[[], Any], *, attempts: int, drain_s: float = 1.0, patience_s: float = 0.0) -> Any:
    """The result of a handle call; cancelling it cancels the call.

    Args:
        make: `lambda: handle.method.remote(...)`; the call must mean the same when it is made again.
        drain_s: what a client is told to wait when the deployment's queue is full.
        patience_s: how long to try again, from the first such answer, while the callee is of another release.

    Raises:
        ApiError: the callee's own; 429 when its queue is full; 503 when it died `attempts` times.
    """
    tries = _Tries(attempts, drain_s, patience_s)
    while True:
        with tries.one():
            response = make()
            try:
                answer = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            if isinstance(answer, ApiError):
                raise answer
            return answer
        await asyncio.sleep(_PAUSE_S)


async def call_stream(
    make: Callable[[], Any], *, attempts: int, drain_s: float = 1.0, patience_s: float = 0.0
) -> AsyncIterator[Any]:
    """The items of a streaming handle call; after a death the next run's items are passed on from where it stopped."""
    tries = _Tries(attempts, drain_s, patience_s)
    passed = 0
    while True:
        with tries.one():
            response = make()
            ended = False
            try:
                skip = passed
                async for item in response:
                    if isinstance(item, ApiError):
                        raise item
                    if skip:
                        skip -= 1
                        continue
                    passed += 1
                    yield item
                ended = True
                return
            finally:
                if not ended:
                    response.cancel()
        await asyncio.sleep(_PAUSE_S)


class _Tries:
    """How often a call may still be made again."""

    def __init__(self, attempts: int, drain_s: float, patience_s: float) -> None:
        self._left, self._drain_s, self._patience_s = attempts, drain_s, patience_s
        self._ends: float | None = None  # of the patience with another release

    @contextmanager
    def one(self) -> Iterator[None]:
        """Swallows what calls for another try."""
        try:
            with _translated(self._drain_s):
                yield
        except Lost:
            self._left -= 1
            if not self._left:
                message = "The replica that ran this request was lost; try again."
                raise ApiError(503, message, code="overloaded", retry_after_s=1.0) from None
        except ApiError as error:
            if error.code != RELEASE_CHANGING:
                raise
            if self._ends is None:
                self._ends = time.monotonic() + self._patience_s
            if time.monotonic() >= self._ends:
                raise


@contextmanager
def _translated(drain_s: float) -> Iterator[None]:
    try:
        yield
    except BackPressureError:
        message = "Too many requests are waiting; try again later."
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=max(drain_s, 1.0)) from None
    except DeploymentUnavailableError:
        raise ApiError(503, "This model is not running.", code="model_unavailable", retry_after_s=5.0) from None
