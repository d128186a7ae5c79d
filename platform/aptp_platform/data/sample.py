"""A captioned image as every format gives it, a fault in its place, and the decoder of its bytes."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclass(frozen=True)
class CaptionedImage:
    """One image as stored (still encoded) and all captions given for it, in their stored order."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    tags: dict[str, str]  # the other strings of the sample's json, such as a style or a kind: for reports only


@dataclass(frozen=True)
class Fault:
    """One thing that could not be read, and why; counted against `data.max_bad_share`."""

    key: str
    cause: Literal["shard", "image", "caption"]
    detail: str


def sample_of(key: str, image: bytes | None, captions: Any, rest: Mapping[str, Any]) -> CaptionedImage | Fault:
    """The sample of these parts: `captions` is a string or a list of strings, `rest` holds all other fields."""
    if image is None:
        return Fault(key, "image", "missing")
    texts = [captions] if isinstance(captions, str) else captions if isinstance(captions, list) else []
    kept = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
    if not kept:
        return Fault(key, "caption", "empty or missing")
    return CaptionedImage(key, image, kept, {name: value for name, value in rest.items() if isinstance(value, str)})


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
