"""Images decode to what a person sees, or not at all."""

import contextlib
import io
import json
import struct

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image, ImageCms

from aptp_platform.data.sample import decode_image
from tests.support.captioned import image_bytes


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exchanged_primaries() -> bytes:
    """A profile in whose space red is green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack(">I", profile[128:132])[0]):
        entry = 132 + 12 * index
        sign = bytes(profile[entry : entry + 4])
        profile[entry : entry + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(sign, sign)
    return bytes(profile)


def test_decoding_fills_the_square_with_the_middle():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = (255, 0, 0)
    pixels = decode_image(encoded(Image.fromarray(image)), 10)
    assert pixels.shape == (3, 10, 10)
    assert pixels[0, 2:-2, 2:-2].min() > 250
    assert pixels[1:, 2:-2, 2:-2].max() < 5


def test_transparency_is_white_and_grey_is_three_channels():
    assert (decode_image(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), 8) == 255).all()
    assert (decode_image(encoded(Image.new("L", (8, 8), 7)), 8) == 7).all()
    assert (decode_image(encoded(Image.new("LA", (8, 8), (7, 255))), 8) == 7).all()


def test_a_photograph_taken_upright_stays_upright():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))  # the top
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    pixels = decode_image(encoded(image.rotate(180), "JPEG", exif=exif, quality=95), 32)
    assert pixels[:, :12].min() > 200
    assert pixels[:, 20:].max() < 55


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", None), ("TIFF", None), ("PNG", 0)])
def test_16_bit_grey_keeps_its_levels(kind, transparency):
    levels = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    options = {} if transparency is None else {"transparency": transparency}
    pixels = decode_image(encoded(Image.fromarray(levels), kind, **options), 64)
    expected = levels >> 8
    if transparency is not None:
        expected = np.where(levels == transparency, 255, expected)
    assert (pixels == expected).all()


def test_lab_is_converted():
    red = Image.new("RGB", (8, 8), (200, 10, 10))
    lab = ImageCms.profileToProfile(
        red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    pixels = decode_image(encoded(lab, "TIFF"), 8)
    assert np.abs(pixels[:, 0, 0].astype(int) - (200, 10, 10)).max() <= 6


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_without_a_known_white_are_refused(kind):
    with pytest.raises(ValueError, match="32-bit numbers"):
        decode_image(encoded(Image.fromarray(np.full((8, 8), 7, kind)), "TIFF"), 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_followed(mode):
    image = Image.new("RGB", (32, 32), (200, 10, 10)).convert(mode)
    pixels = decode_image(encoded(image, icc_profile=exchanged_primaries()), 16)
    assert np.abs(pixels[:, 8, 8].astype(int) - (10, 200, 10)).max() <= 6


def test_a_colour_profile_that_does_not_fit_is_ignored():
    grey, red = Image.new("L", (8, 8), 90), Image.new("RGB", (8, 8), (200, 10, 10))
    assert (decode_image(encoded(grey, icc_profile=exchanged_primaries()), 8) == 90).all()
    assert decode_image(encoded(red, icc_profile=b"no profile"), 8)[:, 0, 0].tolist() == [200, 10, 10]


def test_what_does_not_decode_is_a_value_error():
    for data in (b"", b"GIF89a", image_bytes(0)[:60], json.dumps({}).encode()):
        with pytest.raises(ValueError, match="does not decode"):
            decode_image(data, 16)


@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_decode_or_raise_a_value_error(kind, changes):
    data = bytearray(encoded(Image.new("RGB", (16, 16), (9, 200, 90)), kind))
    for place, byte in changes:
        data[place % len(data)] = byte
    with contextlib.suppress(ValueError):
        assert decode_image(bytes(data), 8).shape == (3, 8, 8)
