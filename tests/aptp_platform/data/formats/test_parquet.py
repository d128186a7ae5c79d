"""A cell that cannot be read costs its row; a column of the wrong type is refused in one line."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aptp_platform.data.formats.parquet import read_parquet
from aptp_platform.data.sample import CaptionedImage
from aptp_platform.storage.store import Store
from tests.support.captioned import image_bytes

IMAGE = image_bytes(0)
BROKEN = pa.array([b"K\xe4se", b"fine"]).view(pa.string())


def read(folder, **columns):
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return list(read_parquet(Store.open(folder), "t.parquet"))


def images(count=2):
    return pa.array([IMAGE] * count)


@pytest.mark.parametrize(
    "captions",
    [BROKEN, BROKEN.dictionary_encode(), pa.ListArray.from_arrays([0, 1, 2], BROKEN), BROKEN.view(pa.binary())],
)
def test_text_that_is_not_utf_8_costs_its_row(captions, tmp_path):
    bad, good = read(tmp_path, image=images(), caption=captions)
    assert (bad.cause, "not utf-8" in bad.detail.lower()) == ("caption", True)
    assert good.captions == ("fine",)


def test_keys_and_tags_that_are_not_utf_8_are_escaped_and_null_keys_are_numbered(tmp_path):
    first, second = read(tmp_path, key=BROKEN, style=BROKEN, image=images(), text=pa.array(["a", "b"]))
    assert "e4" in first.key
    assert "e4" in first.tags["style"]
    assert (second.key, second.tags) == ("fine", {"style": "fine"})
    for null in (pa.array([None, None]), pa.array([None, None], pa.string()), pa.array([float("nan")] * 2)):
        rows = read(tmp_path, id=null, image=images(), text=pa.array(["a", "b"]))
        assert [row.key for row in rows] == ["t.parquet-00000000", "t.parquet-00000001"]


def test_the_first_column_of_a_fitting_type_is_used(tmp_path):
    rows = read(tmp_path, image=pa.array(["1.png"]), bytes=images(1), captions=pa.array([7]), text=pa.array(["a"]))
    assert [(row.image, row.captions) for row in rows] == [(IMAGE, ("a",))]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(len(IMAGE))])
def test_images_may_be_any_kind_of_bytes(kind, tmp_path):
    (row,) = read(tmp_path, image=pa.array([IMAGE], kind), text=pa.array(["a"]))
    assert isinstance(row, CaptionedImage)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": pa.array(["1.png"])}, "the column image is of type string; it must hold bytes"),
        ({"image": pa.array([[1, 2]])}, r"the column image is of type list<.*int64>; it must hold bytes"),
        ({"image": pa.array([{"path": "1.png"}])}, r"the column image is of type struct<path: string>; it must hold"),
        ({"text": pa.array([[{"raw": "a"}]])}, r"the column text is of type list<.*>; it must hold a string or a list"),
        ({"image": pa.array([IMAGE]), "text": pa.array([5])}, "the column text is of type int64"),
    ],
)
def test_a_column_of_the_wrong_type_is_named_with_its_type(columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **{"image": images(1), "text": pa.array(["a"]), **columns})


def test_a_struct_with_a_path_alone_says_what_to_do(tmp_path):
    given = pa.array([{"bytes": None, "path": "1.png"}, {"bytes": IMAGE, "path": None}, None],
                     pa.struct({"bytes": pa.binary(), "path": pa.string()}))  # fmt: skip
    rows = read(tmp_path, image=given, text=pa.array(["a", "b", "c"]))
    assert "holds the path 1.png and no bytes" in rows[0].detail
    assert (rows[1].captions, rows[2].detail) == (("b",), "empty or missing")


def test_a_column_that_comes_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([images(1), images(1), pa.array(["a"])], ["image", "image", "text"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="has 2 columns image; keep one"):
        list(read_parquet(Store.open(tmp_path), "t.parquet"))
