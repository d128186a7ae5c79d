"""Captioned images as files that a listing names: an image folder's `metadata.jsonl`, COCO annotations, a CC3M table.

A listing's paths start in the listing's own folder; COCO's start in the folder that its name ends with, beside it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from aptp_platform.data.sample import CaptionedImage, Fault, sample_of
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import Store

FILE_NAMES = ("file_name", "filepath", "file", "image")
CAPTION_NAMES = ("captions", "caption", "text", "title")
_AHEAD = 16  # image files read at the same time


def read_image_folder(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """`metadata.jsonl`: one line per image, with `file_name` and `text`, `caption` or `captions`."""
    with store.open_file(name) as stream:
        yield from _read_all(store.join(_folder(name)), _json_lines(stream, name))


def read_table_of_files(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """A table with tabs, as CC3M's download tools write it: its header names a file column and a caption column."""
    with store.open_file(name) as stream:
        text = io.TextIOWrapper(stream, "utf-8", "replace", newline="")
        rows = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = rows.fieldnames or ()
        for known in (FILE_NAMES, CAPTION_NAMES):
            if not set(known) & set(columns):
                raise ValueError(f"{name}: its header is {list(columns)}; one column must be {' or '.join(known)}")
        yield from _read_all(store.join(_folder(name)), rows)


def read_coco(store: Store, name: str) -> Iterator[CaptionedImage | Fault]:
    """COCO caption annotations, `annotations/captions_train2017.json`: images in `train2017/` beside `annotations/`."""
    try:
        listed = store.read_json(name)
        images, annotations = listed["images"], listed["annotations"]
        captions: dict[int, list[str]] = {}
        for annotation in annotations:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        rows = [{"file_name": each["file_name"], "captions": captions.get(each["id"], [])} for each in images]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: is no COCO caption file: it lacks {error}; name a captions_*.json") from None
    split = name.rpartition("/")[2].removesuffix(".json").rpartition("_")[2]
    yield from _read_all(store.join(_folder(_folder(name))).join(split), rows)


def _read_all(images: Store, rows: Iterable[Mapping[str, Any] | Fault]) -> Iterator[CaptionedImage | Fault]:
    """Rows in their order, a few image files read ahead."""
    left = iter(rows)
    with ThreadPoolExecutor(_AHEAD) as threads:
        while group := list(islice(left, _AHEAD)):
            yield from threads.map(lambda row: row if isinstance(row, Fault) else _read_one(images, row), group)


def _read_one(images: Store, row: Mapping[str, Any]) -> CaptionedImage | Fault:
    file = next((row[name] for name in FILE_NAMES if row.get(name)), None)
    if not isinstance(file, str):
        return Fault("?", "image", f"its row names no file; it holds {', '.join(map(str, row))}")
    key = file.rpartition(".")[0] or file
    if ".." in file.split("/") or "://" in file:
        return Fault(key, "image", f"{file}: must be a path below the listing's folder")
    captions = next((row[name] for name in CAPTION_NAMES if row.get(name)), None)
    try:
        with images.open_file(file) as stream:
            data = stream.read()
    except StoreError as error:
        if images.exists(file) or not images.exists():
            raise  # it exists but cannot be read, or the whole folder is missing: not this row's fault
        return Fault(key, "image", str(error))
    rest = {name: value for name, value in row.items() if name not in (*FILE_NAMES, *CAPTION_NAMES)}
    return sample_of(key, data, captions, rest)


def _json_lines(stream: Iterable[bytes], name: str) -> Iterator[Mapping[str, Any] | Fault]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield Fault(f"{name}:{number}", "caption", f"its line is no json: {error}")
            continue
        yield row if isinstance(row, dict) else Fault(f"{name}:{number}", "caption", "its line is no json object")


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
