"""Captioned images out of WebDataset shards, tolerantly: what is readable is yielded, what is not becomes a `Fault`.

A shard is a tar or tar.gz. Members that share a name up to the first dot are one sample: an image (`jpg`, `jpeg`,
`png`, `webp`), and captions from `json` (a list under `captions`, or a string under `caption`) or else from `txt`.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

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
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictMember) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, _, extension = base.partition(".")
                if folder + slash + stem != key:
                    if key is not None:
                        yield _sample(key, parts)
                    key, parts = folder + slash + stem, {}
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
    """Decode upright, scale the shorter side to `size` (antialiased), crop the middle: (3, size, size), RGB on white.

    Raises:
        ValueError: when the bytes are no image that Pillow can decode.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.draft("RGB", (size, size))  # a large JPEG is decoded at a fraction of its size, never below `size`
            upright = ImageOps.exif_transpose(opened)
            image = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
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


class _StrictMember(tarfile.TarInfo):
    """tarfile takes a damaged header, or a file that stops after a member, for the end of the archive: rows would be
    missing without a word. The end is the mark of zeros that every archive closes with."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictMember":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the typeshed does not know it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"breaks off: {error}") from None


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
    several, one = record.pop("captions", None), record.pop("caption", None)
    given = several or one
    if given is None and "txt" in parts:
        given = parts["txt"].decode("utf-8", "replace")
    return sample_of(key, image, given, record)


def sample_of(key: str, image: bytes | None, captions: Any, rest: Mapping[str, Any]) -> CaptionedImage | Fault:
    """A sample as every source gives it: `captions` is a string or a list of them, `rest` what else is known of it."""
    if image is None:
        return Fault(key, "image", "missing")
    texts = [captions] if isinstance(captions, str) else captions if isinstance(captions, list) else []
    kept = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
    if not kept:
        return Fault(key, "caption", "empty or missing")
    return CaptionedImage(key, image, kept, {name: value for name, value in rest.items() if isinstance(value, str)})
