"""Captioned images as rows, whatever they are stored as: one schema, read tolerantly and streamed by Ray Data.

A file's name says its format (`FORMATS`); the globs `data.train` and `data.heldout` say which files. One task reads
one file; only rows in transit are held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from typing import Literal

import numpy as np
import pyarrow as pa
import ray.data

from aptp_platform.config import DataConfig
from aptp_platform.data.formats.listing import read_coco, read_image_folder, read_table_of_files
from aptp_platform.data.formats.parquet import read_parquet
from aptp_platform.data.formats.tar import read_shard
from aptp_platform.data.sample import CaptionedImage, Fault, decode_image
from aptp_platform.data.text import printable
from aptp_platform.run.sources import DataFiles, data_files
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import StorageConfig, Store

READER_CPUS = 0.1  # must differ from the actors' CPU request: Ray Data fuses operators with equal resources
PROBED_ROWS = 8
LONGEST_DETAIL = 500  # characters: errors quote names and text that may be of any length
GROUP_ROWS = 64  # rows that leave a reader together ...
GROUP_BYTES = 16 << 20  # ... or fewer, if their images are large

SCHEMA = pa.schema(
    {
        "split": pa.string(),
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


@dataclass(frozen=True)
class SourceFile:
    """One file of captioned images: the split it belongs to, its name, its place among the split's sorted names."""

    split: Literal["train", "heldout"]
    name: str
    place: int


def source_files(config: DataConfig, storage: StorageConfig, listed: DataFiles | None = None) -> list[SourceFile]:
    """The files of both splits, those of `data.train` first.

    Args:
        listed: what the source holds, if that is known.

    Raises:
        ValueError: nothing matches, one file is in both splits, or the format of a file is unknown.
    """
    listed = listed or data_files(config, storage)
    files = []
    splits: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")
    for split in splits:
        for place, name in enumerate(sorted(getattr(listed, split))):
            if _format(name) is None:
                known = ", ".join(FORMATS)
                raise ValueError(f"data.{split}: {name}: unknown format; the name must end in one of {known}")
            files.append(SourceFile(split, name, place))
    twice = {file.name for file in files if file.split == "train"} & {f.name for f in files if f.split == "heldout"}
    if twice:
        raise ValueError(f"data.heldout: {config.heldout!r}: matches {min(twice)}, as data.train does; keep them apart")
    return files


def read_file(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """The samples of one file, in their stored order.

    Raises:
        ValueError: the file is of the wrong kind altogether, such as a table without an image column.
    """
    ending = _format(name)
    assert ending is not None  # source_files has seen to it
    return FORMATS[ending](store, name)


def check_rows(config: DataConfig, storage: StorageConfig, files: Sequence[SourceFile]) -> None:
    """Read the first rows of each split, before any model is loaded for them.

    Raises:
        ValueError: the file lacks a column, or none of its first rows has a caption.
    """
    store = Store.open(config.source, storage)
    for split in dict.fromkeys(file.split for file in files):
        name = next(file.name for file in files if file.split == split)
        try:
            first = list(islice(read_file(store, name), PROBED_ROWS))
        except StoreError:
            raise
        except ValueError as error:
            raise ValueError(f"data.{split}: {error}") from None
        faults = [row for row in first if isinstance(row, Fault) and row.cause == "caption"]
        if first and len(faults) == len(first):
            raise ValueError(
                f"data.{split}: {name}: none of its first {len(first)} rows has a caption (first {faults[0].key}: "
                f"{faults[0].detail}): name files with a txt or json beside each image, or with a caption column"
            )


def read_captioned(
    config: DataConfig, storage: StorageConfig, files: Sequence[SourceFile], readers: int = 4
) -> ray.data.Dataset:
    """The rows of these files, as `SCHEMA`; what could not be read is a row with a `fault`.

    Args:
        readers: tasks that read at the same time.
    """
    return ray.data.from_items([asdict(file) for file in files], override_num_blocks=len(files)).map_batches(
        partial(_read_files, Store.open(config.source, storage), config.max_captions),
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=min(readers, len(files))),
        num_cpus=READER_CPUS,
    )


def decode_rows(size: int, table: pa.Table) -> pa.Table:
    """Bytes to pixels. A row that is bad, or whose image does not decode, keeps its place with a black image."""
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


def _read_files(store: Store, max_captions: int | None, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
    for split, name, place in zip(batch["split"], batch["name"], batch["place"], strict=True):
        group: list[dict[str, object]] = []
        size = 0
        for position, sample in zip(count(int(place) << 32), _read_whole(store, str(name))):
            group.append({"split": split, "position": position, **_row(sample, max_captions)})
            size += len(sample.image) if isinstance(sample, CaptionedImage) else 0
            if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                yield pa.Table.from_pylist(group, SCHEMA)
                group, size = [], 0
        if group:
            yield pa.Table.from_pylist(group, SCHEMA)


def _read_whole(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """As `read_file`; a file of the wrong kind among many is one fault."""
    try:
        yield from read_file(store, name)
    except StoreError:
        raise
    except ValueError as error:
        yield Fault(name, "shard", str(error))


def _row(sample: CaptionedImage | Fault, max_captions: int | None) -> dict[str, object]:
    if isinstance(sample, Fault):
        detail = printable(sample.detail)[:LONGEST_DETAIL]
        given = {"image": b"", "captions": [], "tags": "{}", "fault": sample.cause, "detail": detail}
    else:
        tags = json.dumps(sample.tags)
        captions = list(sample.captions[:max_captions])
        given = {"image": sample.image, "captions": captions, "tags": tags, "fault": "", "detail": ""}
    return {"key": printable(sample.key), **given}
