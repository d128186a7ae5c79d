"""Server-sent events of one image on its way, and the time that a request has."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aptp_platform.serve.args import IngressArgs
from aptp_platform.serve.http.openai import choice_json, error_body, stream_event
from aptp_platform.serve.messages import Choice, Order, Picture, Refusal


async def open_stream(
    items: AsyncIterator[Choice | Picture], order: Order, args: IngressArgs
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
                picture = following.result()
                assert isinstance(picture, Picture)
                name, data = stream_event(order, picture)
                if picture.preview is None:
                    data["aptp"] = choice_json(choice)
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
                if picture.preview is None:
                    return
                following = asyncio.ensure_future(anext(items))
        except Refusal as refusal:
            body = error_body(refusal.status, refusal.message, refusal.code, refusal.param)
            yield f"event: error\ndata: {json.dumps(body)}\n\n"
        finally:
            following.cancel()

    return choice, events()


@asynccontextmanager
async def in_time(limit_s: float) -> AsyncIterator[None]:
    """Ends what is awaited in the block after so long, as a `Refusal` with status 504."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise _late(limit_s) from None


def _late(limit_s: float) -> Refusal:
    message = f"The request was not done within {limit_s:g} s; nothing of it runs any more."
    return Refusal(504, message, code="request_timeout", retry=False)
