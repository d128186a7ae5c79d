"""An image file in any format says what made it, and is as large as it was asked for."""

import io
from typing import Final
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from aptp_platform.serve.engine.images import encode_image
from aptp_platform.serve.messages import OutputFormat

RDF: Final = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC: Final = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
PIXELS = torch.arange(16 * 8 * 3, dtype=torch.uint8).reshape(8, 16, 3)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_file_says_that_a_model_made_it_and_how(output_format: OutputFormat) -> None:
    for edited, kind in ((False, "/trainedAlgorithmicMedia"), (True, "/compositeWithTrainedAlgorithmicMedia")):
        data = encode_image(PIXELS, output_format, edited=edited, facts={"seed": "7"})
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.format) == ((16, 8), output_format.upper())
        (description,) = ElementTree.fromstring(image.info["xmp"]).iter(f"{RDF}Description")
        assert description.attrib[f"{IPTC}DigitalSourceType"].endswith(kind)
        told = image.info["seed"] if output_format == "png" else image.getexif()[0x010E]
        assert told in ("7", "seed=7")


def test_a_png_is_exact_and_a_resized_file_as_large_as_asked() -> None:
    exact = Image.open(io.BytesIO(encode_image(PIXELS, "png", facts={})))
    assert exact.tobytes() == bytes(PIXELS.flatten().tolist())
    assert Image.open(io.BytesIO(encode_image(PIXELS, "png", size=(64, 32), facts={}))).size == (64, 32)
