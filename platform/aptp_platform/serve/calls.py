"""Calls from one deployment to another: run again when a replica died, refused in words when there is no room.

The one place that knows Ray's exceptions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from aptp_platform.serve.orders import Refusal

Lost = (RayActorError, ReplicaUnavailableError)  # the replica died, or cannot be reached: nobody runs the call any more
_PAUSE_S: Final = 0.2  # for the handle to learn which replicas are left


async def call(make: Callable[[], Any], *, attempts: int, drain_s: float = 1.0) -> Any:
    """The result of a handle call; cancelling it cancels the call.

    Args:
        make: `lambda: handle.method.remote(...)`; the call must mean the same when it is made again.
        drain_s: what a client is told to wait when the deployment's queue is full.

    Raises:
        Refusal: the callee's own; 429 when its queue is full; 503 when it died `attempts` times.
    """
    for left in reversed(range(attempts)):
        with _refusing(drain_s, last=not left):
            response = make()
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
        await asyncio.sleep(_PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


async def call_stream(make: Callable[[], Any], *, attempts: int, drain_s: float = 1.0) -> AsyncIterator[Any]:
    """The items of a streaming handle call; after a death the next run's items are passed on from where it stopped."""
    passed = 0
    for left in reversed(range(attempts)):
        with _refusing(drain_s, last=not left):
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


@contextmanager
def _refusing(drain_s: float, *, last: bool) -> Iterator[None]:
    """Swallows a replica's death, unless it is the last attempt's."""
    try:
        yield
    except BackPressureError:
        message = "Too many requests are waiting; try again later."
        raise Refusal(429, message, code="rate_limit_exceeded", retry_after_s=max(drain_s, 1.0)) from None
    except Lost:
        if last:
            message = "The replica that ran this request was lost; try again."
            raise Refusal(503, message, code="overloaded", retry_after_s=1.0) from None
    except DeploymentUnavailableError:
        raise Refusal(503, "This model is not running.", code="model_unavailable", retry_after_s=5.0) from None
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, Refusal):
            raise cause from None
        raise
