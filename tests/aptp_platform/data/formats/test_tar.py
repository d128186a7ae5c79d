"""Shards are read as far as they can be, and nothing that is missing goes unsaid."""

import io
import tarfile
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aptp_platform.data.formats.tar import read_shard
from aptp_platform.data.sample import CaptionedImage, Fault
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
        ({"txt": b"text", "json": b'{"caption": "\\u200b"}'}, ("text",)),
        ({"txt": b"text", "json": b""}, ("text",)),
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
        ([("0.png", b"I"), ("0.json", b"[" * 100_000)], "caption", "its json does not parse"),
        ([("0.png", b"I"), ("0.json", b'["a cat"]')], "caption", "its json is a list, no object"),
        (
            [("0.png", b"I"), ("0.json", b'{"caption": {"raw": "a"}}')],
            "caption",
            "is of type dict; it must be a string",
        ),
        ([("0.png", b"I"), ("0.png", b"J"), ("0.txt", b"a cat")], "image", "holds png twice"),
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


@pytest.mark.parametrize("join", ["plain", "gz"])
def test_archives_joined_to_one_file_are_read_to_the_end(join):
    parts = [tar_of(samples([index]), compressed=join == "gz") for index in range(3)]
    assert [row.key for row in read(b"".join(parts))] == ["00000", "00001", "00002"]
    damaged = bytearray(parts[1] if join == "plain" else tar_of(samples([1])))
    damaged[0] ^= 255
    rows = read(tar_of(samples([0])) + damaged)
    assert (rows[0].key, rows[1].cause, len(rows)) == ("00000", "shard", 2)
    assert read(parts[0] + b"\0" * 700) == read(parts[0])


def test_a_gz_shard_whose_sum_is_wrong_is_told():
    data = bytearray(tar_of(samples([0]), compressed=True))
    data[-8] ^= 255
    assert "CRC" in read(bytes(data))[-1].detail


def test_members_apart_are_one_fault_a_sample_that_says_so():
    rows = read(tar_of([("a.png", b"A"), ("b.png", b"B"), ("a.txt", b"a"), ("b.txt", b"b")]))
    assert [(row.key, row.cause) for row in rows] == [("a", "caption"), ("b", "caption")]
    assert all("sort them by name" in row.detail for row in rows)
    late = read(tar_of([("a.png", b"A"), ("a.txt", b"a"), *samples([1]), ("a.json", b"{}")]))
    assert [type(row) for row in late] == [CaptionedImage, CaptionedImage, Fault]
    assert "its json stands apart" in late[2].detail


def test_a_name_that_comes_twice_is_two_samples():
    members = [("a.png", b"A"), ("a.txt", b"one"), ("a.png", b"B"), ("a.txt", b"two")]
    for repeated in (members, [*members[:2], *samples([1]), *members[2:]]):
        rows = [row for row in read(tar_of(repeated)) if row.key == "a"]
        assert [(row.image, row.captions) for row in rows] == [(b"A", ("one",)), (b"B", ("two",))]


def test_dots_in_names_cost_a_fault_each_and_endings_with_dots_none():
    dotted = [(f"22.{index}.{kind}", b"x") for index in range(3) for kind in ("png", "txt")]
    rows = read(tar_of([*dotted, *samples([1])]))
    assert [row.key for row in rows] == ["22.0", "22.1", "22.2", "00001"]
    assert "first dot" in rows[0].detail
    (row,) = read(tar_of([("a.png", b"A"), ("a.seg.png", b"S"), ("a.txt", b"a"), ("a.cls", b"7")]))
    assert (row.image, row.captions) == (b"A", ("a",))


def test_what_file_managers_leave_is_no_sample():
    junk = ("._00001.png", ".DS_Store", "__MACOSX/._00001.png", "__MACOSX/a.txt", "Thumbs.db")
    rows = read(tar_of([(name, b"x") for name in junk] + samples([1])))
    assert [row.key for row in rows] == ["00001"]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_a_link_is_a_fault_that_names_it(kind):
    stream = io.BytesIO(tar_of(samples([0])))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = kind, "00000.png"
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo("folder.txt"))
    rows = read(stream.getvalue())
    assert (rows[1].key, rows[1].cause) == ("b", "image")
    assert "b.png is a link to 00000.png" in rows[1].detail
