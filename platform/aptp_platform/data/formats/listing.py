"""Captioned images as files that a listing names: an image folder's `metadata.jsonl`, COCO annotations, a CC3M table.

`run.sources.images_folder` says where the paths of a listing start.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Final

from aptp_platform.data.sample import CaptionedImage, Fault, sample_of
from aptp_platform.data.text import decode_text, marked_encoding
from aptp_platform.run.sources import images_folder
from aptp_platform.storage.errors import MissingError, StoreError
from aptp_platform.storage.store import Store

FILE_NAMES = ("file_name", "filepath", "file", "image")
CAPTION_NAMES = ("captions", "caption", "text", "title")
_AHEAD = 16  # image files read at the same time
_LONGEST_OBJECT: Final = 1024  # bytes of a name in a bucket
_NAME_ERRORS: Final = (  # of the operating system: about one name, not about the disk
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.EINVAL,
)  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """What a listing says of one image. place: where in the listing."""

    place: str
    fields: Mapping[str, Any]


def read_image_folder(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """`metadata.jsonl`: one line per image, with `file_name` and `text`, `caption` or `captions`."""
    with store.open_file(name) as stream:
        yield from _read_all(store.join(images_folder(name)), _json_lines(_lines(stream, name), name))


def read_table_of_files(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """A table with tabs, as CC3M's download tools write it: its header names a file column and a caption column."""
    with store.open_file(name) as stream:
        lines = _lines(stream, name)
        columns = [column.strip() for column in _text(next(lines, b""), name).split("\t")]
        for known in (FILE_NAMES, CAPTION_NAMES):
            if not set(known) & set(columns):
                raise ValueError(_no_header(name, columns, known))
        if len(set(columns)) < len(columns):
            raise ValueError(f"{name}: its header is {columns}; every column must have a name of its own")
        yield from _read_all(store.join(images_folder(name)), _table_rows(lines, columns, name))


def read_coco(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """COCO caption annotations, `annotations/captions_train2017.json`: images in `train2017/` beside `annotations/`."""
    with store.open_file(name) as stream:
        data = stream.read()
    try:
        listed = json.loads(data)
    except (ValueError, RecursionError) as error:
        yield Fault(name, "shard", f"is no JSON: {error}")
        return
    rows = list(_coco_rows(listed, name))
    yield from _read_all(store.join(images_folder(name)), rows)


def _coco_rows(listed: Any, name: str) -> Iterator[_Row | Fault]:
    """An image with its captions, or a fault for what has no partner."""
    images, annotations = (listed.get(part) if isinstance(listed, dict) else None for part in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        lacking = "images" if not isinstance(images, list) else "annotations"
        raise ValueError(f"{name}: is no COCO caption file: it lacks '{lacking}'; name a captions_*.json")
    if annotations and not any(isinstance(each, dict) and "caption" in each for each in annotations):
        raise ValueError(f"{name}: is no COCO caption file: it lacks 'caption'; name a captions_*.json")
    captions: dict[str, list[Any]] = {}
    for number, each in enumerate(annotations):
        if isinstance(each, dict) and {"image_id", "caption"} <= each.keys():
            captions.setdefault(_identity(each["image_id"]), []).append(each["caption"])
        else:
            yield Fault(f"{name}: annotation {number}", "caption", "lacks image_id or caption")
    seen: set[str] = set()
    for number, each in enumerate(images):
        if not isinstance(each, dict) or not {"id", "file_name"} <= each.keys():
            yield Fault(f"{name}: image {number}", "image", "lacks id or file_name")
        elif (identity := _identity(each["id"])) in seen:
            yield Fault(f"{name}: image {number}", "image", f"its id {each['id']} is another image's too")
        else:
            seen.add(identity)
            fields = {"file_name": each["file_name"], "captions": captions.get(identity, [])}
            yield _Row(f"{name}: image {number}", fields)
    for identity in (each for each in captions if each not in seen):
        yield Fault(f"{name}: image_id {identity}", "image", "has captions, and `images` does not list it")


def _identity(value: Any) -> str:
    """1, 1.0 and "1" are one image."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read_all(images: Store, rows: Iterable[_Row | Fault]) -> Iterator[CaptionedImage | Fault]:
    """Rows in their order, a few image files read ahead."""
    left = iter(rows)
    with ThreadPoolExecutor(_AHEAD) as threads:
        while group := list(islice(left, _AHEAD)):
            yield from threads.map(lambda row: row if isinstance(row, Fault) else _read_one(images, row), group)


def _read_one(images: Store, entry: _Row) -> CaptionedImage | Fault:
    row = entry.fields
    file = next((row[name] for name in FILE_NAMES if row.get(name)), None)
    if not isinstance(file, str):
        held = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
        return Fault(entry.place, "image", f"names no file; it holds {held}")
    key = file.rpartition(".")[0] or file
    if wrong := _wrong_name(file, images):
        return Fault(key, "image", wrong)
    try:
        with images.open_file(file) as stream:
            data = stream.read()
    except StoreError as error:
        if not _is_about_the_name(error, images) or not images.exists():
            raise  # the disk or the bucket fails, or the whole folder is missing: not this row's fault
        return Fault(key, "image", str(error))
    candidates = [row[name] for name in CAPTION_NAMES if name in row]
    rest = {name: value for name, value in row.items() if name not in (*FILE_NAMES, *CAPTION_NAMES)}
    return sample_of(key, data, candidates, rest)


def _wrong_name(file: str, images: Store) -> str:
    if "://" in file:
        return f"{file}: is a URL; download the image, and name its path below the listing's folder"
    if ".." in file.split("/"):
        return f"{file}: must be a path below the listing's folder"
    try:
        size = len(file.encode())
    except UnicodeEncodeError:
        size = 0
    if not size or "\0" in file:
        return f"{file!r}: can be no file's name"
    if not images.is_local and size > _LONGEST_OBJECT:
        return f"{file[:64]}...: has {size} bytes; a name in a bucket has at most {_LONGEST_OBJECT}"
    return ""


def _is_about_the_name(error: StoreError, images: Store) -> bool:
    if isinstance(error, MissingError):
        return True
    cause = error.__context__  # what the operating system said
    return images.is_local and isinstance(cause, OSError) and cause.errno in _NAME_ERRORS


def _lines(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """The lines of a listing, without a byte order mark."""
    start = stream.readline()
    encoding = marked_encoding(start)
    if encoding not in (None, "utf-8-sig"):
        raise ValueError(f"{name}: is {encoding}; convert it to UTF-8: iconv -f {encoding} -t utf-8")
    yield start.removeprefix("\ufeff".encode())
    yield from stream


def _text(line: bytes, name: str) -> str:
    try:
        return decode_text(line)
    except ValueError as error:
        raise ValueError(f"{name}: its first line {error}") from None


def _no_header(name: str, columns: list[str], known: tuple[str, ...]) -> str:
    shown = f"{name}: its header is {str(columns)[:200]}"
    if any("://" in column for column in columns):
        return (
            f"{shown}: that is a row with a URL, as CC3M publishes them; download the images, with img2dataset say, "
            "and write a table with the header filepath, title"
        )
    return f"{shown}; one column must be {' or '.join(known)}"


def _table_rows(lines: Iterable[bytes], columns: list[str], name: str) -> Iterator[_Row | Fault]:
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            values = decode_text(line.rstrip(b"\r\n")).split("\t")
        except ValueError as error:
            yield Fault(f"{name}:{number}", "caption", f"its line {error}")
            continue
        if len(values) > len(columns):
            detail = f"its line has {len(values)} columns, the header names {len(columns)}: a tab within a field?"
            yield Fault(f"{name}:{number}", "caption", detail)
        else:
            yield _Row(f"{name}:{number}", dict(zip(columns, values, strict=False)))


def _json_lines(lines: Iterable[bytes], name: str) -> Iterator[_Row | Fault]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Fault(f"{name}:{number}", "caption", f"its line is no json: {error}")
            continue
        place = f"{name}:{number}"
        yield _Row(place, row) if isinstance(row, dict) else Fault(place, "caption", "its line is no json object")
