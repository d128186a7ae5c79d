"""One schema comes out of every source format, from a disk and from a bucket."""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from aptp_platform.config import DataConfig, StorageConfig
from aptp_platform.data.captions import SCHEMA, SourceFile, _read_files, check_rows, read_captioned, source_files
from aptp_platform.data.encode import translated_errors
from aptp_platform.storage.store import Store
from tests.support.captioned import captions_of, image_bytes, samples, tar_of, write_shards

INDICES = range(10)
LOCAL = StorageConfig()


def write_tar(folder):
    (folder / "set.tar").write_bytes(tar_of(samples(INDICES)))
    return "*.tar"


def write_gz(folder):
    (folder / "set.tgz").write_bytes(tar_of(samples(INDICES), compressed=True))
    return "*.tgz"


def write_parquet(folder):
    table = pa.table(
        {
            "key": [f"{index:05d}" for index in INDICES],
            "image": [{"bytes": image_bytes(index), "path": None} for index in INDICES],
            "captions": [captions_of(index) for index in INDICES],
            "kind": [f"kind-{index % 4}" for index in INDICES],
        }
    )
    pq.write_table(table, folder / "set.parquet", row_group_size=4)
    return "*.parquet"


def write_images(folder, suffix="png"):
    folder.mkdir(exist_ok=True)
    for index in INDICES:
        (folder / f"{index:05d}.{suffix}").write_bytes(image_bytes(index))


def write_image_folder(folder):
    write_images(folder / "pictures")
    rows = [
        {"file_name": f"{index:05d}.png", "captions": captions_of(index), "kind": f"kind-{index % 4}"}
        for index in INDICES
    ]
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return "pictures/metadata.jsonl"


def write_coco(folder):
    write_images(folder / "train2017")
    (folder / "annotations").mkdir()
    listed = {
        "images": [{"id": index, "file_name": f"{index:05d}.png"} for index in INDICES],
        "annotations": [
            {"image_id": index, "id": 100 * index + number, "caption": caption}
            for number in range(3)
            for index in INDICES
            for caption in captions_of(index)[number : number + 1]
        ],
    }
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(listed))
    return "annotations/captions_*.json"


def write_cc3m(folder):
    write_images(folder / "images")
    lines = ["title\tfilepath", *[f"{captions_of(index)[0]}\timages/{index:05d}.png" for index in INDICES]]
    (folder / "Train_GCC-training.tsv").write_text("\n".join(lines) + "\n")
    return "*.tsv"


WRITERS = (write_tar, write_gz, write_parquet, write_image_folder, write_coco, write_cc3m)


def rows_of(source, pattern, storage=LOCAL):
    names = Store.open(source, storage).list(pattern)
    files = [SourceFile("train", name, place) for place, name in enumerate(names)]
    with translated_errors():
        rows = read_captioned(DataConfig(source=str(source)), storage, files).take_all()
    return sorted(rows, key=lambda row: row["position"])


def read_here(folder, name):
    """The rows that a reading task gives for one file."""
    batch = {"split": np.array(["train"]), "name": np.array([name]), "place": np.array([0])}
    return [row for table in _read_files(Store.open(folder), None, batch) for row in table.to_pylist()]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_every_format_gives_the_same_rows(write, where, tmp_path, request, local_ray):
    pattern = write(tmp_path)
    source, storage = str(tmp_path), LOCAL
    if where == "s3":
        server = request.getfixturevalue("s3_server")
        storage = StorageConfig(endpoint=server.endpoint)
        source = server.bucket(f"captions-{write.__name__.replace('_', '-')}")
        Store.open(source, storage).publish(tmp_path, "data")
        source += "/data"
    rows = rows_of(source, pattern, storage)
    assert [row["fault"] for row in rows] == [""] * len(INDICES), [row["detail"] for row in rows]
    assert [row["key"].rpartition("/")[2] for row in rows] == [f"{index:05d}" for index in INDICES]
    for index, row in zip(INDICES, rows, strict=True):
        assert set(row) == set(SCHEMA.names)
        assert row["image"] == image_bytes(index)
        assert row["captions"] == (captions_of(index)[:1] if write is write_cc3m else captions_of(index))
        assert (row["split"], row["position"]) == ("train", index)
    if write in (write_tar, write_parquet, write_image_folder):
        assert json.loads(rows[2]["tags"]) == {"kind": "kind-2"}


@pytest.mark.usefixtures("local_ray")
def test_only_as_many_captions_of_an_image_are_read_as_asked_for(tmp_path):
    write_tar(tmp_path)
    config = DataConfig(source=str(tmp_path), train="*.tar", heldout="none", max_captions=1)
    rows = read_captioned(config, LOCAL, [SourceFile("train", "set.tar", 0)]).take_all()
    assert {row["key"]: list(row["captions"]) for row in rows} == {
        f"{index:05d}": captions_of(index)[:1] for index in INDICES
    }
    assert any(len(captions_of(index)) > 1 for index in INDICES)


def test_positions_follow_the_sorted_files_whichever_of_them_are_read(tmp_path, local_ray):
    write_shards(tmp_path, train=12, shards=3, heldout=2)
    config = DataConfig(source=str(tmp_path))
    files = source_files(config, LOCAL)
    assert [(file.split, file.place) for file in files] == [("train", 0), ("train", 1), ("train", 2), ("heldout", 0)]
    rows = read_captioned(config, LOCAL, files[2:]).take_all()
    assert {(row["split"], row["position"], row["key"]) for row in rows} == {
        *(("train", 2 << 32 | row, f"{2 + 3 * row:05d}") for row in range(4)),
        *(("heldout", row, f"{12 + row:05d}") for row in range(2)),
    }


def test_bad_rows_and_files_are_rows_with_a_fault(tmp_path, local_ray):
    pictures = tmp_path / "pictures"
    write_images(pictures)
    lines = [
        '{"file_name": "00000.png", "text": "a cat"}',
        '{"file_name": "absent.png", "text": "a cat"}',
        '{"file_name": "00001.png", "text": ""}',
        '{"file_name": "../secret.png", "text": "a cat"}',
        '{"text": "a cat"}',
        "no json",
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    rows = rows_of(tmp_path, "pictures/metadata.jsonl")
    assert [row["fault"] for row in rows] == ["", "image", "caption", "image", "image", "caption"]
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    (tmp_path / "whole.tar").write_bytes(tar_of(samples([3])))
    assert [(row["key"], row["fault"]) for row in rows_of(tmp_path, "*.tar")] == [
        ("broken.tar", "shard"),
        ("00003", ""),
    ]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    assert [(row["key"], row["fault"]) for row in rows_of(tmp_path, "*.parquet")] == [("broken.parquet", "shard")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "table.tsv",
            "url\tcaption\nhttp://a\tb\n",
            r"its header is \['url', 'caption'\]; one column [^\n]*$",
        ),
        ("captions_x.json", '{"info": 1}', "is no COCO caption file: it lacks 'images'"),
        ("a.parquet", None, "has the columns image; one must be named captions or caption"),
    ],
)
def test_a_file_of_the_wrong_kind_ends_the_job_before_it_starts_and_costs_a_file_later(
    name, content, message, tmp_path
):
    if content is None:
        pq.write_table(pa.table({"image": [b"i"]}), tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^data.train: {name}: {message}"):
        check_rows(DataConfig(source=str(tmp_path)), LOCAL, [SourceFile("train", name, 0)])
    (row,) = read_here(tmp_path, name)
    assert (row["key"], row["fault"]) == (name, "shard")
    assert re.match(f"{name}: {message}", row["detail"])


def test_files_that_cannot_be_sources_are_named_before_anything_runs(tmp_path):
    def refused(train, heldout):
        with pytest.raises(ValueError, match=r"^data|: ") as caught:
            source_files(DataConfig(source=str(tmp_path), train=train, heldout=heldout), LOCAL)
        return str(caught.value)

    (tmp_path / "train-0.tar").write_bytes(b"")
    (tmp_path / "train-1.zip").write_bytes(b"")
    assert "data.train: train-1.zip: unknown format; the name must end in one of .tar," in refused("*", "*")
    assert "no file matches 'test_*'; it holds train-0.tar" in refused("*.tar", "test_*")
    assert "data.heldout: '*-0*': matches train-0.tar, as data.train does" in refused("*.tar", "*-0*")


GOOD = b"a cat"
CAPTIONS = st.one_of(
    st.just(GOOD), st.binary(max_size=8), st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass"))
)


def tar_from(rows):
    kinds = ("txt", "json")
    members = [
        (f"{index}.{kind}", data)
        for index, (image, caption) in enumerate(rows)
        for kind, data in (("png", image_bytes(0) if image else None), (kinds[index % 2], caption))
        if data is not None
    ]
    return "x.tar", tar_of(members)


def parquet_from(rows):
    images = pa.array([image_bytes(0) if image else None for image, _ in rows], pa.binary())
    captions = pa.array([caption for _, caption in rows], pa.binary()).view(pa.string())
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": images, "text": captions, "id": captions, "style": captions}), stream)
    return "x.parquet", stream.getvalue().to_pybytes()


def jsonl_from(rows):
    lines = [
        b'{"file_name": "%s", "text": "%s"}' % (_file(image), caption.replace(b"\n", b" ")) for image, caption in rows
    ]
    return "x.jsonl", b"\n".join(lines)


def tsv_from(rows):
    lines = [b"%s\t%s" % (_file(image), caption.replace(b"\n", b" ")) for image, caption in rows]
    return "x.tsv", b"\n".join([b"file\ttext", *lines])


def coco_from(rows):
    images = [{"id": index, "file_name": _file(image).decode()} for index, (image, _) in enumerate(rows)]
    texts = [{"image_id": index, "caption": _text(caption)} for index, (_, caption) in enumerate(rows)]
    return "annotations/captions_images.json", json.dumps({"images": images, "annotations": texts}).encode()


def _file(image):
    return b"1.png" if image else b"absent.png"


def _text(caption):
    return caption.decode("utf-8", "surrogateescape")


def read_made(name, data):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for each in ("annotations", "images"):
            (folder / each).mkdir()
        for each in ("1.png", "images/1.png"):
            (folder / each).write_bytes(image_bytes(0))
        (folder / name).write_bytes(data)
        return read_here(folder, name)


BUILDERS = (tar_from, parquet_from, jsonl_from, tsv_from, coco_from)


@pytest.mark.parametrize("build", BUILDERS)
@settings(max_examples=25)
@given(rows=st.lists(st.tuples(st.booleans(), CAPTIONS), min_size=1, max_size=6))
def test_every_row_that_goes_in_is_one_row_or_one_fault(build, rows):
    found = read_made(*build(rows))
    assert len(found) == len(rows)
    for index, ((image, caption), row) in enumerate(zip(rows, found, strict=True)):
        assert row["fault"] in ("", "image", "caption")
        assert row["image"] == (image_bytes(0) if row["fault"] == "" else b"")
        assert all(text.strip() for text in row["captions"])
        if caption == GOOD and not (build is tar_from and index % 2):  # whose json it is not
            assert (row["fault"], row["captions"]) == (("", ["a cat"]) if image else ("image", []))


@pytest.mark.parametrize("build", BUILDERS)
@settings(max_examples=40)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4), st.integers(0, 4)), max_size=4),
    end=st.floats(0, 1),
)
def test_a_file_damaged_anywhere_ends_nothing(build, changes, end):
    name, data = build([(True, GOOD)] * 4)
    for place, put, removed in changes:
        start = int(place * len(data))
        data = data[:start] + put + data[start + removed :]
    whole = data[: int(end * len(data))] if end < 0.5 else data
    for row in read_made(name, whole):
        assert row["fault"] in ("", "image", "caption", "shard")
