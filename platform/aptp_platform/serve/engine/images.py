"""Pixels become the bytes of an image file that says where it comes from."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Final

from jaxtyping import UInt8
from PIL import Image, PngImagePlugin
from torch import Tensor

from aptp_platform.serve.messages import OutputFormat

_IMAGE_DESCRIPTION: Final = 0x010E  # the EXIF tag
# IPTC's terms for what made a picture: a model alone, or a model from a picture.
_SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_XMP: Final = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{_SOURCE_TYPE}{{kind}}"/></rdf:RDF></x:xmpmeta>'
)


def encode_image(
    pixels: UInt8[Tensor, "height width 3"],
    output_format: OutputFormat,
    *,
    compression: int = 100,
    size: tuple[int, int] | None = None,
    edited: bool = False,
    facts: Mapping[str, str],
) -> bytes:
    """The file's bytes, which say that a trained model made the picture (XMP `DigitalSourceType`).

    Args:
        compression: quality of jpeg and webp, 0..100, OpenAI's `output_compression`; PNG ignores it.
        size: (width, height) to which the pixels are resampled; None: as they are.
        edited: it was made from another picture.
        facts: text chunks of a PNG; in the others, `name=value` lines of the EXIF image description.
    """
    image, stream = Image.fromarray(pixels.numpy()), io.BytesIO()
    if size is not None:
        image = image.resize(size, Image.Resampling.LANCZOS)
    xmp = _XMP.format(kind="compositeWithTrainedAlgorithmicMedia" if edited else "trainedAlgorithmicMedia")
    if output_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp)
        for name, value in facts.items():
            chunks.add_text(name, value)
        image.save(stream, "png", pnginfo=chunks, compress_level=4)
        return stream.getvalue()
    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = "\n".join(f"{name}={value}" for name, value in facts.items())
    image.save(stream, output_format, quality=compression, exif=exif, xmp=xmp.encode())
    return stream.getvalue()
