"""Shards are read as far as they can be, and nothing that is missing goes unsaid."""

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from aptp_platform.data.formats.tar import read_shard
from aptp_platform.data.sample import CaptionedImage, Fault, decode_image
from tests.support.captioned import image_bytes, samples, tar_of


def read(data: bytes) -> list[Any]:
    return list(read_shard(io.BytesIO(data), "shard.tar"))


def only_fault(data: bytes) -> Fault:
    (fault,) = [each for each in read(data) if isinstance(each, Fault)]
    return fault


@pytest.mark.parametrize("compressed", [False, True])
def test_samples_come_in_their_order_with_all_captions(compressed):
    rows = read(tar_of(samples(range(5)), compressed))
    assert [row.key for row in rows] == [f"{index:05d}" for index in range(5)]
    third = rows[2]
    assert isinstance(third, CaptionedImage)
    assert third.captions == ("a car", "car number 2", "picture of a car")
    assert third.tags == {"kind": "kind-2"}
    assert third.image == image_bytes(2)


def test_samples_of_one_name_in_two_folders_are_two():
    members = [("a/1.png", b"A"), ("a/1.txt", b"in a"), ("./b/1.png", b"B"), ("b/1.txt", b"in b")]
    assert [(row.key, row.image, row.captions) for row in read(tar_of(members))] == [
        ("a/1", b"A", ("in a",)),
        ("b/1", b"B", ("in b",)),
    ]


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"txt": b" a cat \n"}, ("a cat",)),
        ({"txt": b"text", "json": b'{"caption": "json", "kind": "k"}'}, ("json",)),
        ({"json": b'{"captions": ["one", " ", "two"], "caption": "three"}'}, ("one", "two")),
        ({"txt": b"text", "json": b'{"captions": []}'}, ("text",)),
    ],
)
def test_where_captions_come_from(members, captions):
    (row,) = read(tar_of([("0.png", b"I"), *[(f"0.{kind}", data) for kind, data in members.items()]]))
    assert row.captions == captions
    assert set(row.tags) <= {"kind"}


@pytest.mark.parametrize(
    ("members", "cause", "detail"),
    [
        ([("0.txt", b"a cat")], "image", "no member ends in any of jpg"),
        ([("0.png", b"I")], "caption", "empty or missing"),
        ([("0.png", b"I"), ("0.txt", b"  ")], "caption", "empty or missing"),
        ([("0.png", b"I"), ("0.json", b"{")], "caption", "its json does not parse"),
        ([], "shard", "holds no sample"),
    ],
)
def test_bad_rows_are_faults_and_the_others_stand(members, cause, detail):
    rows = read(tar_of([*members, *samples([7])] if members else []))
    fault = rows[0]
    assert isinstance(fault, Fault)
    assert fault.cause == cause
    assert detail in fault.detail
    assert len(rows) == 1 or rows[1].key == "00007"


def test_what_is_no_tar_is_one_fault():
    for data in (b"", b"not a tar at all", b"\0" * 100, image_bytes(0)):
        fault = only_fault(data)
        assert (fault.key, fault.cause) == ("shard.tar", "shard")


@pytest.mark.parametrize("compressed", [False, True])
@given(share=st.floats(0.01, 0.99))
def test_a_shard_cut_anywhere_yields_whole_rows_and_a_fault(compressed, share):
    whole = tar_of(samples(range(4)), compressed)
    content = len(whole) if compressed else max(index for index, byte in enumerate(whole) if byte)
    rows = read(whole[: int(share * content)])
    good = [row for row in rows if isinstance(row, CaptionedImage)]
    assert good == read(whole)[: len(good)]
    assert len(good) == 4 or (isinstance(rows[-1], Fault) and rows[-1].cause == "shard")


def test_a_damaged_header_is_not_the_end():
    data = bytearray(tar_of(samples(range(4))))
    header = data.index(b"00002.png")
    data[header : header + 4] = b"\xff\xfe\xfd\xfc"
    rows = read(bytes(data))
    assert isinstance(rows[-1], Fault)
    assert "breaks off" in rows[-1].detail


def test_decoding_fills_the_square_with_the_middle():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = (255, 0, 0)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    pixels = decode_image(stream.getvalue(), 10)
    assert pixels.shape == (3, 10, 10)
    assert pixels[0, 2:-2, 2:-2].min() > 250
    assert pixels[1:, 2:-2, 2:-2].max() < 5


def test_transparency_is_white_and_grey_is_three_channels():
    stream = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(stream, "PNG")
    assert (decode_image(stream.getvalue(), 8) == 255).all()
    stream = io.BytesIO()
    Image.new("L", (8, 8), 7).save(stream, "PNG")
    assert (decode_image(stream.getvalue(), 8) == 7).all()


def test_a_photograph_taken_upright_stays_upright():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))  # the top
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    stream = io.BytesIO()
    image.rotate(180).save(stream, "JPEG", exif=exif, quality=95)
    pixels = decode_image(stream.getvalue(), 32)
    assert pixels[:, :12].min() > 200
    assert pixels[:, 20:].max() < 55


def test_what_does_not_decode_is_a_value_error():
    for data in (b"", b"GIF89a", image_bytes(0)[:60], json.dumps({}).encode()):
        with pytest.raises(ValueError, match="does not decode"):
            decode_image(data, 16)
