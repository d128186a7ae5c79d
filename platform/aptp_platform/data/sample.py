"""A captioned image as every format gives it, a fault in its place, and the decoder of its bytes."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from aptp_platform.data.colours import eight_bits, to_srgb
from aptp_platform.data.text import first_captions, printable

LARGEST_IMAGE: Final = 1 << 30  # bytes: Arrow's columns of a block end at 2 GiB


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


def sample_of(
    key: str, image: bytes | None, candidates: Iterable[Any], rest: Mapping[str, Any], lacks: str = ""
) -> CaptionedImage | Fault:
    """The sample of these parts.

    Args:
        candidates: what may hold the captions, strings or lists of strings; the first that is not empty does.
        rest: all other fields; those that are strings become tags.
        lacks: what to say if nothing holds a caption.
    """
    if not image:
        return Fault(key, "image", "empty or missing")
    if len(image) > LARGEST_IMAGE:
        return Fault(key, "image", f"has {len(image)} bytes; an image has at most {LARGEST_IMAGE}")
    try:
        captions = first_captions(candidates)
    except ValueError as error:
        return Fault(key, "caption", str(error))
    if not captions:
        return Fault(key, "caption", f"empty or missing{lacks and f': {lacks}'}")
    tags = {printable(name): printable(value) for name, value in rest.items() if isinstance(value, str)}
    return CaptionedImage(key, image, captions, tags)


def decode_image(data: bytes, size: int) -> UInt8[np.ndarray, "channel height width"]:
    """Decode upright, scale the shorter side to `size` (antialiased), crop the middle: (3, size, size), sRGB on white.

    Raises:
        ValueError: when the bytes are no image that Pillow can decode.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.draft("RGB", (size, size))  # a large JPEG is decoded at a fraction of its size, never below `size`
            image = eight_bits(ImageOps.exif_transpose(opened))
            profile = opened.info.get("icc_profile")
            # Colours that a palette names or that are half transparent become RGB here, in the profile's own space.
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            elif image.mode not in ("L", "CMYK"):
                image = image.convert("RGB")
            width, height = image.size
            if (width, height) != (size, size):
                side = min(width, height)
                left, top = (width - side) // 2, (height - side) // 2
                box = (left, top, left + side, top + side)
                image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
            return np.ascontiguousarray(np.asarray(to_srgb(image, profile)).transpose(2, 0, 1))
    except Exception as error:  # decoders of damaged bytes raise whatever they stumble over
        raise ValueError(f"does not decode: {type(error).__name__}: {error}") from None
