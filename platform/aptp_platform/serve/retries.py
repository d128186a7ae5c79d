"""Calls from one deployment to another: retried when a replica died, an `ApiError` when there is no room.

The one place that knows Ray's exceptions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from aptp_platform.serve.messages import RELEASE_CHANGING, ApiError

Lost = (RayActorError, ReplicaUnavailableError)  # the replica died, or cannot be reached: nobody runs the call any more
_PAUSE_S: Final = 0.2  # for the handle to learn which replicas are left


async def call(make: Callable[[], Any], *, attempts: int, drain_s: float = 1.0, patience_s: float = 0.0) -> Any:
    """The result of a handle call; cancelling it cancels the call.

    Args:
        make: `lambda: handle.method.remote(...)`; the call must mean the same when it is made again.
        drain_s: what a client is told to wait when the deployment's queue is full.
        patience_s: how long to try again while the callee is of another release than the caller.

    Raises:
        ApiError: the callee's own; 429 when its queue is full; 503 when it died `attempts` times.
    """
    tries = _Tries(attempts, drain_s, patience_s)
    while True:
        with tries.one():
            response = make()
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
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
        self._left, self._drain_s, self._ends = attempts, drain_s, time.monotonic() + patience_s

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
            if error.code != RELEASE_CHANGING or time.monotonic() >= self._ends:
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
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, ApiError):
            raise cause from None
        raise
