"""Captioned images out of WebDataset shards, tolerantly: what is readable is yielded, what is not becomes a `Fault`.

A shard is a tar or tar.gz. Members that share a name up to the first dot are one sample: an image (`jpg`, `jpeg`,
`png`, `webp`), and captions from `json` (a list under `captions`, or a string under `caption`) or else from `txt`.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class CaptionedImage:
    """One image as stored (still encoded) and all captions given for it, in their stored order."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    tags: dict[str, str]  # the other strings of the sample's json, such as a style or a kind: for reports only


@dataclass(frozen=True)
class Fault:
    """One thing that could not be read, and why; counted and held against the configured share."""

    key: str
    cause: Literal["shard", "image", "caption"]
    detail: str


def read_shard(stream: IO[bytes], name: str) -> Iterator[CaptionedImage | Fault]:
    """Samples of one shard in their stored order; a shard that breaks off yields a fault after what could be read.

    Args:
        stream: the raw bytes of a `.tar` or `.tar.gz`; it is read once, forwards.
        name: what faults call this shard.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                stem, _, extension = member.name.rpartition("/")[2].partition(".")
                if stem != key:
                    if key is not None:
                        yield _sample(key, parts)
                    key, parts = stem, {}
                opened = archive.extractfile(member)
                assert opened is not None  # it is a file
                parts[extension.lower()] = opened.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield Fault(name, "shard", f"{type(error).__name__}: {error}")
        return  # the last sample may be cut in two
    if key is not None:
        yield _sample(key, parts)
    else:
        yield Fault(name, "shard", "holds no sample")


def decode_image(data: bytes, size: int) -> UInt8[np.ndarray, "channel height width"]:
    """Decode, scale the shorter side to `size` (antialiased) and crop the middle: (3, size, size), RGB on white.

    Raises:
        ValueError: when the bytes are no image that Pillow can decode.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGBA") if opened.mode in ("RGBA", "LA", "P") else opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError, ValueError) as error:
        raise ValueError(f"does not decode: {type(error).__name__}: {error}") from None
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _sample(key: str, parts: dict[str, bytes]) -> CaptionedImage | Fault:
    image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
    if image is None:
        return Fault(key, "image", f"no member ends in any of {', '.join(IMAGE_EXTENSIONS)}")
    record: dict[str, Any] = {}
    if "json" in parts:
        try:
            loaded = json.loads(parts["json"])
        except ValueError as error:
            return Fault(key, "caption", f"its json does not parse: {error}")
        record = loaded if isinstance(loaded, dict) else {}
    given = record.get("captions", record.get("caption"))
    if given is None and "txt" in parts:
        given = parts["txt"].decode("utf-8", "replace")
    texts = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    captions = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
    if not captions:
        return Fault(key, "caption", "empty or missing")
    tags = {name: value for name, value in record.items() if isinstance(value, str) and name != "caption"}
    return CaptionedImage(key, image, captions, tags)
