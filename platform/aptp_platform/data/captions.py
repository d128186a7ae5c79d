"""Captioned images as rows, whatever they are stored as: one schema, read tolerantly and streamed by Ray Data.

A file's name says its format (`FORMATS`); the globs `data.train` and `data.heldout` say which files. One task reads
one file; nothing is held but the rows on their way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray.data

from aptp_platform.data.listings import read_coco, read_image_folder, read_table_of_files
from aptp_platform.data.shards import CaptionedImage, Fault, decode_image, read_shard
from aptp_platform.data.tables import read_parquet
from aptp_platform.storage import StorageConfig, Store

if TYPE_CHECKING:
    from aptp_platform.config import DataConfig  # brings torch, which no reading task needs

READER_CPUS = 0.25
GROUP_ROWS = 64  # rows that leave a reader together ...
GROUP_BYTES = 16 << 20  # ... or fewer, if their images are large

SCHEMA = pa.schema(
    {
        "position": pa.int64(),  # the file's place among the sorted names << 32 | the row's place in it
        "key": pa.string(),
        "image": pa.binary(),
        "captions": pa.list_(pa.string()),
        "tags": pa.string(),  # json
        "fault": pa.string(),  # a cause, or "": then the row is good
        "detail": pa.string(),
    }
)


def _read_tar(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    with store.open_file(name) as stream:
        yield from read_shard(stream, name)


FORMATS: dict[str, Callable[[Store, str], Iterator[CaptionedImage | Fault]]] = {
    ".tar": _read_tar,
    ".tar.gz": _read_tar,
    ".tgz": _read_tar,
    ".parquet": read_parquet,
    ".jsonl": read_image_folder,
    ".json": read_coco,
    ".tsv": read_table_of_files,
}


def source_files(config: DataConfig, storage: StorageConfig, pattern: str) -> list[str]:
    """Names of the files that match, sorted.

    Raises:
        ValueError: nothing matches, or the format of a file is unknown.
    """
    field = "data.heldout" if pattern == config.heldout else "data.train"
    names = Store.open(config.source, storage).require(pattern, f"data.source or {field}")
    for name in names:
        if _format(name) is None:
            raise ValueError(f"{field}: {name}: unknown format; the name must end in one of {', '.join(FORMATS)}")
    return names


def read_captioned(
    config: DataConfig, storage: StorageConfig, pattern: str, files: slice = slice(None)
) -> ray.data.Dataset:
    """The rows of the files that match, as `SCHEMA`; what could not be read is a row with a `fault`.

    Args:
        files: which of the sorted files; a row's `position` does not depend on it.
    """
    names = list(enumerate(source_files(config, storage, pattern)))[files]
    items = [{"name": name, "place": place} for place, name in names]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        partial(_read_files, Store.open(config.source, storage)),
        batch_size=1,
        num_cpus=READER_CPUS,
    )


def decode_rows(size: int, table: pa.Table) -> pa.Table:
    """Bytes to pixels. A row that is bad, or turns out so, keeps its place with a black image."""
    faults, details = table["fault"].to_pylist(), table["detail"].to_pylist()
    pixels = np.zeros((len(table), 3, size, size), np.uint8)
    for row, data in enumerate(table["image"].to_pylist()):
        if faults[row]:
            continue
        try:
            pixels[row] = decode_image(data, size)
        except ValueError as error:
            faults[row], details[row] = "image", str(error)
    kept = table.drop_columns(["image", "fault", "detail"])
    kept = kept.append_column("fault", pa.array(faults)).append_column("detail", pa.array(details))
    return kept.append_column("image", pa.FixedShapeTensorArray.from_numpy_ndarray(pixels))


def _format(name: str) -> str | None:
    return next((ending for ending in FORMATS if name.lower().endswith(ending)), None)


def _read_files(store: Store, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
    for name, place in zip(batch["name"], batch["place"], strict=True):
        ending = _format(name)
        assert ending is not None  # source_files has seen to it
        group: list[dict[str, object]] = []
        size = 0
        for position, sample in zip(count(int(place) << 32), FORMATS[ending](store, str(name))):
            group.append(_row(position, sample))
            size += len(sample.image) if isinstance(sample, CaptionedImage) else 0
            if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                yield pa.Table.from_pylist(group, SCHEMA)
                group, size = [], 0
        if group:
            yield pa.Table.from_pylist(group, SCHEMA)


def _row(position: int, sample: CaptionedImage | Fault) -> dict[str, object]:
    if isinstance(sample, Fault):
        given = {"image": b"", "captions": [], "tags": "{}", "fault": sample.cause, "detail": sample.detail}
    else:
        tags = json.dumps(sample.tags)
        given = {"image": sample.image, "captions": list(sample.captions), "tags": tags, "fault": "", "detail": ""}
    return {"position": position, "key": sample.key, **given}
