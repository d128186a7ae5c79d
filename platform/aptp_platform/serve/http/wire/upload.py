"""The body of a request on its way in: of the right type, of a bearable size, and in time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from aptp_platform.serve.args import IngressArgs
from aptp_platform.serve.messages import ApiError


async def read_json(request: Request, args: IngressArgs) -> bytes:
    """The bytes of a JSON body.

    Raises:
        ApiError: 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"The body's content type is {kind[:64]!r}; send application/json.", code="unsupported_media_type"
        )
    return await _read(request, args.max_body_bytes, args.body_timeout_s)


async def _read(request: Request, limit: int, timeout_s: float) -> bytes:
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        message = f"The body did not arrive within {timeout_s:g} s."
        raise ApiError(408, message, code="request_timeout", retry=False) from None
    return bytes(body)
