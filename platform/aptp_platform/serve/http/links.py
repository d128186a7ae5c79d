"""Images that wait to be fetched: `response_format: url` is answered with URLs of this server, which expire."""

from __future__ import annotations

import asyncio
import atexit
import logging
import re
import secrets
import shutil
import tempfile
import time
from typing import Final

from aptp_platform.serve.args import LinkArgs
from aptp_platform.serve.messages import MEDIA_TYPES, ApiError, OutputFormat
from aptp_platform.storage.errors import MissingError, StoreError
from aptp_platform.storage.store import StorageConfig, Store

PATH: Final = "/v1/images/files"
_NAME: Final = re.compile(r"([0-9]{10,12})-[\w-]{32}\.(png|jpeg|webp)")
_SWEEP_S: Final = 60.0  # between two looks for expired files
_LOG = logging.getLogger("ray.serve")


class ImageLinks:
    """Writes images into a folder under names that nobody can guess; whoever has a name may fetch its image.

    A name begins with the second in which it expires, so any replica can refuse it and remove its file.
    """

    def __init__(self, args: LinkArgs, storage: StorageConfig) -> None:
        self._args, self._swept = args, time.monotonic()
        folder = args.folder
        if folder is None:  # the last replica's images go with it
            folder = tempfile.mkdtemp(prefix="aptp-images-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self._store = Store.open(folder, storage)

    async def add(self, data: bytes, output_format: OutputFormat, reached_at: str) -> str:
        """The URL of an image from now on. reached_at: scheme and host that the client used.

        Raises:
            ApiError: 503 when the folder takes no file.
        """
        name = f"{int(time.time() + self._args.expires_s):010d}-{secrets.token_urlsafe(24)}.{output_format}"
        try:
            await asyncio.to_thread(self._write, name, data)
        except StoreError as error:
            _LOG.warning("an image could not be kept for its URL: %s", error)
            message = "The image could not be kept for its URL; ask for 'response_format' b64_json."
            raise ApiError(503, message, code="storage_unavailable", param="response_format") from None
        return f"{(self._args.base_url or reached_at).rstrip('/')}{PATH}/{name}"

    async def read(self, name: str) -> tuple[bytes, str]:
        """An image's bytes and media type.

        Raises:
            ApiError: 404 where nothing is, or is any more.
        """
        match = _NAME.fullmatch(name)
        try:
            if match is not None and int(match[1]) > time.time():
                data = await asyncio.to_thread(self._read, name)
                return data, next(kind for known, kind in MEDIA_TYPES.items() if known == match[2])
        except MissingError:
            pass
        raise ApiError(404, "There is no such image, or its URL has expired.", code="image_not_found")

    def _read(self, name: str) -> bytes:
        with self._store.open_file(name) as stream:
            return stream.read()

    def _write(self, name: str, data: bytes) -> None:
        with self._store.open_file(name, "wb") as stream:
            stream.write(data)
        if time.monotonic() - self._swept > min(_SWEEP_S, self._args.expires_s):
            self._swept = time.monotonic()
            for each in self._store.list("*"):
                match = _NAME.fullmatch(each)
                if match is not None and int(match[1]) <= time.time():
                    self._store.remove(each)
