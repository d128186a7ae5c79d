"""Captioned images in Parquet tables: a column of image bytes, and a column of one caption or of several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aptp_platform.data.sample import CaptionedImage, Fault, sample_of
from aptp_platform.storage.store import Store

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "bytes")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
KEY_COLUMNS = ("key", "__key__", "id")
_ROWS = 64


def read_parquet(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """Rows in their stored order. An image may be bytes, or a struct with `bytes`, as the `datasets` library writes it.

    Raises:
        ValueError: the table has no column of images or none of captions.
    """
    with store.open_file(name) as stream:
        try:
            table = pq.ParquetFile(stream)
        except (pa.ArrowInvalid, OSError) as error:
            yield Fault(name, "shard", f"{type(error).__name__}: {error}")
            return
        columns = table.schema_arrow.names
        image, captions = _one(columns, IMAGE_COLUMNS, name), _one(columns, CAPTION_COLUMNS, name)
        key = next((column for column in KEY_COLUMNS if column in columns), None)
        kinds = zip(columns, table.schema_arrow.types, strict=True)
        tags = [each for each, kind in kinds if pa.types.is_string(kind) and each not in (image, captions, key)]
        wanted = [image, captions, *tags, *([key] if key else [])]
        place = 0
        try:
            for batch in table.iter_batches(_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    own = str(row[key]) if key else f"{name}-{place:08d}"
                    yield sample_of(own, _image_bytes(row[image]), row[captions], {tag: row[tag] for tag in tags})
                    place += 1
        except (pa.ArrowInvalid, OSError) as error:
            yield Fault(name, "shard", f"breaks off after {place} rows: {type(error).__name__}: {error}")


def _one(columns: list[str], known: tuple[str, ...], name: str) -> str:
    found = next((column for column in known if column in columns), None)
    if found is None:
        raise ValueError(f"{name}: has the columns {', '.join(columns)}; one must be named {' or '.join(known)}")
    return found


def _image_bytes(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) and value else None
