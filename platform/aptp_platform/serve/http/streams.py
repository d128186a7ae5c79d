"""Server-sent events of one image on its way, and the time that a request has."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aptp_platform.serve.args import IngressArgs
from aptp_platform.serve.http.wire.openai import choice_json, error_body, stream_event
from aptp_platform.serve.messages import ApiError, Choice, GenerationRequest, ImageResult


async def open_stream(
    items: AsyncIterator[Choice | ImageResult], request: GenerationRequest, args: IngressArgs
) -> tuple[Choice, AsyncIterator[str]]:
    """A stream's choice and its server-sent events. Until the choice is known, an error has a status of its own."""
    limit_s, late = _limit(request, args)
    ends = time.monotonic() + limit_s
    async with in_time(request, args):
        choice = await anext(items)
    assert isinstance(choice, Choice)

    async def events() -> AsyncIterator[str]:
        following = asyncio.ensure_future(anext(items))
        try:
            while True:
                left_s = ends - time.monotonic()
                done, _ = await asyncio.wait((following,), timeout=max(0.0, min(args.heartbeat_s, left_s)))
                if not done:
                    if left_s <= args.heartbeat_s:
                        raise late
                    yield ": ping\n\n"
                    continue
                image = following.result()
                assert isinstance(image, ImageResult)
                name, data = stream_event(request, image)
                if image.preview is None:
                    data["aptp"] = choice_json(choice)
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
                if image.preview is None:
                    return
                following = asyncio.ensure_future(anext(items))
        except ApiError as error:
            body = error_body(error.status, error.message, error.code, error.param)
            yield f"event: error\ndata: {json.dumps(body)}\n\n"
        finally:
            following.cancel()

    return choice, events()


@asynccontextmanager
async def in_time(request: GenerationRequest, args: IngressArgs) -> AsyncIterator[None]:
    """Ends what is awaited in the block when the request's time is over, as an `ApiError` with status 504."""
    limit_s, late = _limit(request, args)
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise late from None


def _limit(request: GenerationRequest, args: IngressArgs) -> tuple[float, ApiError]:
    """The seconds that a request still has, and what it is told after them."""
    limit_s = args.request_timeout_s
    left_s = limit_s if request.expires is None else max(0.0, request.expires - time.time())
    if left_s < limit_s:
        message = f"No image within 'deadline_ms' {request.deadline_ms:g}; nothing of the request runs any more."
        return left_s, ApiError(504, message, code="deadline_exceeded", param="deadline_ms", retry=False)
    message = f"The request was not done within {limit_s:g} s; nothing of it runs any more."
    return limit_s, ApiError(504, message, code="request_timeout", retry=False)
