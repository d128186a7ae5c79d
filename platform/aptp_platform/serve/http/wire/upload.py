"""The body of a request on its way in: of the right type, of a bearable size, and in time."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from email.message import Message
from typing import Final

from starlette.requests import Request

from aptp_platform.serve.args import IngressArgs
from aptp_platform.serve.messages import ApiError

_MOST_PARTS: Final = 64
_MOST_TEXT_BYTES: Final = 65_536  # of one field that is no file
_BOUNDARY: Final = re.compile(r"[\w'()+,./:=? -]{1,70}")


@dataclass(frozen=True)
class Form:
    """What a multipart body holds: text by field, files by field in their order. `image[]` is the field `image`."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


async def read_json(request: Request, args: IngressArgs) -> bytes:
    """The bytes of a JSON body.

    Raises:
        ApiError: 408, 413 or 415.
    """
    _check_type(request, "application/json")
    return await _read(request, args.max_body_bytes, args.body_timeout_s)


async def read_form(request: Request, args: IngressArgs) -> Form:
    """A multipart body.

    Raises:
        ApiError: 400, 408, 413 or 415.
    """
    _check_type(request, "multipart/form-data")
    header = Message()
    header["content-type"] = request.headers["content-type"]
    boundary = header.get_param("boundary", "")
    if not isinstance(boundary, str) or _BOUNDARY.fullmatch(boundary) is None:
        raise _broken("its content type names no boundary")
    return parse_form(await _read(request, args.max_upload_bytes, args.upload_timeout_s), boundary)


def parse_form(body: bytes, boundary: str) -> Form:
    """A multipart body's parts (RFC 7578).

    Raises:
        ApiError: 400.
    """
    first, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(), _MOST_PARTS + 2)
    if len(parts) > _MOST_PARTS + 1:
        raise _broken(f"it has more than {_MOST_PARTS} parts")
    if not parts or first.strip() or not parts[-1].startswith(b"--"):
        raise _broken("it does not begin and end with its boundary")
    form = Form()
    for part in parts[:-1]:
        head, separator, content = part.partition(b"\r\n\r\n")
        if not separator:
            raise _broken("a part has no end of its headers")
        name, is_file = _named(head.decode("utf-8", "replace"))
        if is_file:
            form.files.setdefault(name, []).append(content)
            continue
        try:
            form.fields[name] = content[: _MOST_TEXT_BYTES + 1].decode()
        except UnicodeDecodeError:
            raise _broken("a field is not UTF-8") from None
        if len(content) > _MOST_TEXT_BYTES:
            raise _broken(f"a field is longer than {_MOST_TEXT_BYTES} bytes")
    return form


def _named(head: str) -> tuple[str, bool]:
    """The field of a part, and whether it is a file."""
    for line in head.split("\r\n"):
        kind, _, value = line.partition(":")
        if kind.strip().lower() == "content-disposition":
            disposition = Message()
            disposition["content-disposition"] = " ".join(value.split())
            name = disposition.get_param("name", None, "content-disposition")
            if isinstance(name, str) and name:
                return name.removesuffix("[]"), disposition.get_filename() is not None
    raise _broken("a part has no name")


def _broken(why: str) -> ApiError:
    return ApiError(400, f"The body is no multipart form: {why}.", code="invalid_form")


def _check_type(request: Request, wanted: str) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        message = f"The body's content type is {kind[:64]!r}; send {wanted}."
        raise ApiError(415, message, code="unsupported_media_type")


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
