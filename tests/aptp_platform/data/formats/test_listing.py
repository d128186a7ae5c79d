"""A line of a listing that is wrong costs that row; a file that is no listing is refused in one line."""

import json

import pytest

from aptp_platform.data.formats.listing import read_coco, read_image_folder, read_table_of_files
from aptp_platform.data.sample import CaptionedImage, Fault
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import Store
from tests.support.captioned import image_bytes


@pytest.fixture
def folder(tmp_path):
    for place in ("1.png", "train2017/1.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(image_bytes(1))
    (tmp_path / "annotations").mkdir()
    return tmp_path


def read(reader, folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(reader(Store.open(folder), name))


def told(rows):
    return [row.captions if isinstance(row, CaptionedImage) else (row.cause, row.detail) for row in rows]


@pytest.mark.parametrize(
    ("line", "cause", "detail"),
    [
        ('{"file_name": "a\\u0000b.png", "text": "t"}', "image", "can be no file's name"),
        ('{"file_name": "a\\ud83d.png", "text": "t"}', "image", "can be no file's name"),
        (json.dumps({"file_name": "a" * 300, "text": "t"}), "image", "File name too long"),
        ('{"file_name": "train2017", "text": "t"}', "image", "Is a directory"),
        ('{"file_name": "1.png/x.png", "text": "t"}', "image", "Not a directory"),
        ('{"file_name": "absent.png", "text": "t"}', "image", "does not exist"),
        ('{"file_name": "https://host.invalid/1.png", "text": "t"}', "image", "is a URL; download"),
        ('{"file_name": {"path": "1.png"}, "text": "t"}', "image", "names no file; it holds file_name (dict)"),
        ('{"file_name": "1.png", "text": "\\ud83d"}', "caption", "is damaged: it holds U+D83D"),
        ('{"file_name": "1.png", "text": ["a", {}]}', "caption", "is of type dict"),
        ('{"file_name": "1.png"}', "caption", "empty or missing"),
        ('{"a":' * 100_000, "caption", "its line is no json"),
        ("[1]", "caption", "its line is no json object"),
    ],
)
def test_a_bad_line_is_one_fault_and_the_next_line_is_read(line, cause, detail, folder):
    bad, good = read(read_image_folder, folder, "metadata.jsonl", f'{line}\n\n{{"file_name": "1.png", "text": "t"}}\n')
    assert isinstance(bad, Fault)
    assert (bad.cause, detail in bad.detail) == (cause, True), bad
    assert good.captions == ("t",)


def test_captions_come_from_the_first_field_that_is_not_empty(folder):
    line = '{"file_name": "1.png", "captions": [""], "caption": "\\u200b", "text": "t", "title": "u"}'
    assert told(read(read_image_folder, folder, "metadata.jsonl", "\ufeff" + line)) == [("t",)]


def test_a_disk_that_fails_is_no_bad_row(folder):
    with pytest.raises(StoreError, match="does not exist"):
        read(read_coco, folder, "annotations/captions_val2017.json", COCO % ("1", "1"))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_bad_lines_of_a_table(mark, folder):
    table = f"{mark}title\tfile\r\na\t1.png\r\nb\tc\t1.png\n\nshort\n".encode()
    rows = told(read(read_table_of_files, folder, "x.tsv", table + b"K\xe4se\t1.png\n" + b"a" * 140_000 + b"\t1.png\n"))
    assert rows[0] == ("a",)
    assert [row[0] for row in rows[1:]] == ["caption", "image", "caption", "caption"]
    for row, detail in zip(
        rows[1:], ("3 columns, the header names 2", "names no file", "not utf-8", "140000"), strict=True
    ):
        assert detail in row[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a red apple\thttp://host.invalid/1.png\n", "a row with a URL, as CC3M publishes them; download the images"),
        ("url\tcaption\n", "one column must be file_name or filepath"),
        ("", "one column must be file_name or filepath"),
        ("file\ttitle\ttitle\n", "every column must have a name of its own"),
        ("file\ttitle\n".encode("utf-16"), r"x.tsv: is utf-16; convert it to UTF-8: iconv -f utf-16 -t utf-8$"),
        (b"file\xe4\ttitle\n", "its first line is not utf-8"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(content, message, folder):
    with pytest.raises(ValueError, match=message):
        read(read_table_of_files, folder, "x.tsv", content)


COCO = '{"images": [{"id": %s, "file_name": "1.png"}], "annotations": [{"image_id": %s, "caption": "a"}]}'


@pytest.mark.parametrize("ids", [("1", '"1"'), ('"x"', '"x"'), ("1.0", "1")])
def test_ids_match_whatever_their_type(ids, folder):
    assert told(read(read_coco, folder, "annotations/captions_train2017.json", COCO % ids)) == [("a",)]


def test_what_has_no_partner_in_coco_is_a_fault(folder):
    image, caption = {"id": 1, "file_name": "1.png"}, {"image_id": 1, "caption": "a"}
    listed = {"images": [image, image, {"id": 2}, 3], "annotations": [caption, {"image_id": 9, "caption": "b"}, {}]}
    rows = read(read_coco, folder, "annotations/captions_train2017.json", json.dumps(listed))
    assert [row.captions for row in rows if isinstance(row, CaptionedImage)] == [("a",)]
    details = " ".join(row.detail for row in rows if isinstance(row, Fault))
    for part in ("another image's too", "lacks id or file_name", "does not list it", "lacks image_id or caption"):
        assert part in details
    assert len(rows) == 6


@pytest.mark.parametrize("content", ["{", "[" * 100_000, b"\xff"])
def test_coco_that_is_no_json_is_a_bad_file(content, folder):
    ((cause, detail),) = told(read(read_coco, folder, "annotations/captions_train2017.json", content))
    assert (cause, detail.startswith("is no JSON")) == ("shard", True)


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        ("[]", "images"),
        ('{"images": []}', "annotations"),
        ('{"images": [], "annotations": [{"bbox": []}]}', "caption"),
    ],
)
def test_other_json_is_refused(content, lacks, folder):
    with pytest.raises(ValueError, match=f"is no COCO caption file: it lacks '{lacks}'"):
        read(read_coco, folder, "annotations/captions_train2017.json", content)
