"""Pictures that come with a request: decoded within limits, cut to the size that is drawn, the mask beside them.

What is transparent is drawn anew: in the mask, or without one in the picture itself. In a mask without transparency it
is what is white.
"""

from __future__ import annotations

import io
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from aptp_platform.serve.args import ImageArgs
from aptp_platform.serve.http.wire.fields import EditRequest, VariationRequest
from aptp_platform.serve.http.wire.substitutes import size_of
from aptp_platform.serve.http.wire.upload import Form
from aptp_platform.serve.messages import ApiError, Catalog, SourceImage

_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_MOST_PIXELS: Final = 50_000_000
_OPAQUE: Final = 128  # alpha from which a pixel is kept
_ORIENTATION: Final = 0x0112  # the EXIF tag
_ON_ITS_SIDE: Final = 5  # its least value of a picture that is shown with sides exchanged


def with_source(
    body: EditRequest, unknown: list[str], form: Form, limits: ImageArgs, catalog: Catalog
) -> tuple[EditRequest, list[str], SourceImage]:
    """A body whose size is a served one, that nearest to its picture's where it names none; and the picture.

    Raises:
        ApiError: 400 where there is no picture, or it cannot be read.
    """
    picture, mask = _opened(form, "image"), _opened(form, "mask") if form.files.get("mask") else None
    if body.size == "auto":
        upright = picture.size if picture.getexif().get(_ORIENTATION, 1) < _ON_ITS_SIDE else picture.size[::-1]
        nearest = limits.model_copy(update={"other_sizes": "nearest"})
        width, height = size_of(f"{upright[0]}x{upright[1]}", nearest, catalog.size).drawn
        body = body.model_copy(update={"size": f"{width}x{height}"})
    strength = body.strength
    if strength is None and isinstance(body, VariationRequest):
        strength = limits.variation_strength
    size = size_of(body.size, limits, catalog.size).drawn
    fitted = _fitted(picture, size)
    anew: Image.Image | None
    if mask is not None:
        masked = _fitted(mask, size)
        anew = _transparent(masked) or masked.convert("L").point(lambda value: 255 * (value >= _OPAQUE))
    else:
        anew = _transparent(fitted)
    if strength is None:
        strength = limits.edit_strength if anew is None else limits.mask_strength
    source = SourceImage(fitted.convert("RGB").tobytes(), None if anew is None else anew.tobytes(), strength)
    return body, unknown, source


def _transparent(image: Image.Image) -> Image.Image | None:
    """255 where a picture is transparent; None of an opaque one."""
    alpha = image.convert("RGBA").getchannel("A").point(lambda value: 255 * (value < _OPAQUE))
    return alpha if alpha.getbbox() else None


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cut from its middle to the shape of a size and resampled to it."""
    return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGBA"), size, Image.Resampling.LANCZOS)


def _opened(form: Form, name: str) -> Image.Image:
    files = form.files.get(name)
    if not files:
        message = f"Missing required parameter: '{name}': send a file."
        raise ApiError(400, message, code="missing_required_parameter", param=name)
    try:
        image = Image.open(io.BytesIO(files[0]), formats=_FORMATS)
        if image.width * image.height <= _MOST_PIXELS:
            image.load()
            return image
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise _unreadable(name, type(error).__name__) from None
    raise _unreadable(name, f"more than {_MOST_PIXELS} pixels")


def _unreadable(name: str, why: str) -> ApiError:
    message = f"Invalid '{name}': it cannot be read ({why}); send a PNG, JPEG or WebP."
    return ApiError(400, message, code="invalid_image", param=name)
