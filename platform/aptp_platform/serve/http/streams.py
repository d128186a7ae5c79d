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
    ends = time.monotonic() + args.request_timeout_s
    async with in_time(args.request_timeout_s):
        choice = await anext(items)
    assert isinstance(choice, Choice)

    async def events() -> AsyncIterator[str]:
        following = asyncio.ensure_future(anext(items))
        try:
            while True:
                done, _ = await asyncio.wait((following,), timeout=args.heartbeat_s)
                if not done:
                    if time.monotonic() > ends:
                        raise _late(args.request_timeout_s)
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
async def in_time(limit_s: float) -> AsyncIterator[None]:
    """Ends what is awaited in the block after so long, as an `ApiError` with status 504."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise _late(limit_s) from None


def _late(limit_s: float) -> ApiError:
    message = f"The request was not done within {limit_s:g} s; nothing of it runs any more."
    return ApiError(504, message, code="request_timeout", retry=False)
