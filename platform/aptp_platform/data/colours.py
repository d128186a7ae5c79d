"""Pixels as screens show them: 8 bits a channel, in sRGB."""

import io
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image, ImageCms

_SPACES: Final = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # of a profile that fits a mode
_SRGB: Final = ImageCms.createProfile("sRGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel: 16-bit grey loses its lower half, all else is returned as it is.

    Raises:
        ValueError: its pixels are 32-bit numbers, of which no file says which is white.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}); save it with 8 bits a channel")
    if not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image)
    grey = Image.fromarray((levels >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:  # the level that is transparent
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An RGB, L or CMYK image in sRGB. A broken profile, or one of another colour space, is ignored, as in viewers."""
    transform = _transform(profile, image.mode) if profile and image.mode in _SPACES else None
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is, unless it was asked to work in place
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        return ImageCms.buildTransform(source, _SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
