"""Captioned images in Parquet tables: a column of image bytes, and a column of one caption or of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aptp_platform.data.sample import CaptionedImage, Fault, sample_of
from aptp_platform.data.text import printable
from aptp_platform.storage.store import Store

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "bytes")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
KEY_COLUMNS = ("key", "__key__", "id")
_ROWS = 64


class _Unreadable:
    """A cell whose value cannot be a Python object, such as a string that is not UTF-8."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def read_parquet(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """Rows in their stored order. An image may be bytes, or a struct with `bytes`, as the `datasets` library writes it.

    Raises:
        ValueError: the table has no column of images or none of captions.
    """
    with store.open_file(name) as stream:
        try:
            table = pq.ParquetFile(stream)
            schema, total = table.schema_arrow, table.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            yield Fault(name, "shard", f"{type(error).__name__}: {error}")
            return
        image = _one(schema, IMAGE_COLUMNS, _holds_images, "bytes, or a struct with the bytes in a field bytes", name)
        caption = _one(schema, CAPTION_COLUMNS, _holds_captions, "a string or a list of strings", name)
        key = next((column for column in KEY_COLUMNS if column in schema.names), None)
        texts = [field.name for field in schema if _is_text(field.type)]
        tags = [each for each in texts if each not in (image, caption, key) and texts.count(each) == 1]
        wanted = [image, caption, *tags, *([key] if key else [])]
        place = 0
        try:
            for batch in table.iter_batches(_ROWS, columns=wanted):
                cells = {column: _cells(batch.column(batch.schema.names.index(column))) for column in wanted}
                for row in range(batch.num_rows):
                    given = {tag: _text(cells[tag][row]) for tag in tags}
                    own = _text(cells[key][row]) if key else ""
                    yield _sample(own or f"{name}-{place:08d}", cells[image][row], cells[caption][row], given)
                    place += 1
        except (pa.ArrowException, OSError) as error:
            detail = f"breaks off after {place} of {total} rows: {type(error).__name__}: {error}"
            yield Fault(name, "shard", detail)


def _sample(key: str, image: Any, caption: Any, tags: dict[str, str]) -> CaptionedImage | Fault:
    if isinstance(image, dict):
        if image.get("bytes") is None and image.get("path"):
            return Fault(key, "image", f"holds the path {image['path']} and no bytes; embed the images in the table")
        image = image.get("bytes")
    for cause, cell in (("image", image), ("caption", caption)):
        if isinstance(cell, _Unreadable):
            return Fault(key, "image" if cause == "image" else "caption", cell.reason)
    return sample_of(key, image, [caption], tags)


def _one(schema: pa.Schema, known: tuple[str, ...], fits: Callable[[Any], bool], must: str, name: str) -> str:
    found = [column for column in known if column in schema.names]
    if not found:
        raise ValueError(f"{name}: has the columns {', '.join(schema.names)}; one must be named {' or '.join(known)}")
    for column in found:
        if schema.names.count(column) > 1:
            raise ValueError(f"{name}: has {schema.names.count(column)} columns {column}; keep one of them")
        if fits(schema.field(column).type):
            return column
    raise ValueError(f"{name}: the column {found[0]} is of type {schema.field(found[0]).type}; it must hold {must}")


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_bytes(kind.field(index).type)
    return _is_bytes(kind)


def _holds_captions(kind: Any) -> bool:
    lists = (
        pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
        pa.types.is_large_list_view,
    )  # fmt: skip
    inner = kind.value_type if any(is_list(kind) for is_list in lists) else kind
    return _is_text(inner) or _is_bytes(inner)


def _is_bytes(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    fixed, null = pa.types.is_fixed_size_binary(kind), pa.types.is_null(kind)
    return fixed or null or any(kind.equals(each) for each in (pa.binary(), pa.large_binary(), pa.binary_view()))


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(kind.equals(each) for each in (pa.string(), pa.large_string(), pa.string_view()))


def _cells(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, ArithmeticError):  # of one cell, such as text that is not UTF-8
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return _Unreadable(f"is not UTF-8: {error.object!r}"[:200])
    except (ValueError, OverflowError, ArithmeticError) as error:
        return _Unreadable(f"is no {scalar.type}: {error}")


def _text(value: Any) -> str:
    """A key or a tag; "" for what is null."""
    if isinstance(value, _Unreadable):
        return value.reason
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return printable(value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value))
