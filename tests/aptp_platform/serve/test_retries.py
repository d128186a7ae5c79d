"""Calls between deployments: refusals come back as values; patience with another release starts at its first one."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aptp_platform.serve.messages import RELEASE_CHANGING, ApiError
from aptp_platform.serve.retries import call, call_stream

CHANGING = ApiError(503, "another release", code=RELEASE_CHANGING)


class Response:
    """What a handle call gives: something to await or to iterate over, which can be cancelled."""

    def __init__(self, *items: Any, after_s: float = 0.0) -> None:
        self._items, self._after_s = items, after_s

    def __await__(self) -> Any:
        yield from asyncio.sleep(self._after_s).__await__()
        return self._items[0]

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self._items:
            yield item

    def cancel(self) -> None:
        pass


def test_a_returned_refusal_is_raised_to_the_caller() -> None:
    refusal = ApiError(429, "full", code="full")
    with pytest.raises(ApiError, match="full"):
        asyncio.run(call(lambda: Response(refusal), attempts=1))

    passed: list[Any] = []

    async def stream() -> None:
        async for item in call_stream(lambda: Response(1, 2, refusal), attempts=1):
            passed.append(item)

    with pytest.raises(ApiError, match="full"):
        asyncio.run(stream())
    assert passed == [1, 2]


def test_patience_with_another_release_starts_at_the_first_refusal() -> None:
    answers = [Response(CHANGING, after_s=0.5), Response("an image")]
    assert asyncio.run(call(lambda: answers.pop(0), attempts=1, patience_s=0.3)) == "an image"
    with pytest.raises(ApiError, match="another release"):
        asyncio.run(call(lambda: Response(CHANGING), attempts=1, patience_s=0.0))
