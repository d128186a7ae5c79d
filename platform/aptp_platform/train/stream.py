"""The rows that a worker trains on, streamed from the encoded Parquet by Ray Data, in an order that its place decides.

    epoch e     the files in an order drawn from (seed, e), cut into windows of some thousand rows;
                a window's rows in an order drawn from (seed, e, window)
    the stream  epoch 0, epoch 1, ... without end; rank r of R has its windows r, r + R, r + 2 R, ...

So every rank has as many batches as it wants (none waits for another's last one), an epoch goes once through the data
whatever the number of ranks, and a run that goes on from step s starts reading where step s reads. Ray Train's own
split of a dataset starts at its first row in every execution, which is why a worker asks for its rows itself.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.data
import torch
from jaxtyping import Float
from ray.data import TaskPoolStrategy
from ray.data.block import BlockAccessor
from torch import Tensor

from aptp_platform.config import ConfigError
from aptp_platform.data.encoded import choose_caption
from aptp_platform.storage import Store

READERS = 2  # tasks of a worker that read ahead
READER_CPUS = 0.05
SAMPLED_FILES = 16

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """One Parquet file and how many of its rows the stream uses."""

    name: str
    rows: int


@dataclass(frozen=True)
class Stream:
    """Rows of `encoded`, or those of them with a caption that `assigned` gives to `code`, with such a caption."""

    encoded: Store
    parts: tuple[Part, ...]
    seed: int
    assigned: Store | None = None
    code: int | None = None
    window_rows: int = 8192

    def __post_init__(self) -> None:
        if not sum(part.rows for part in self.parts):
            of = "" if self.code is None else f" of code {self.code}"
            raise ConfigError(f"{self.encoded.uri}: holds no row{of} to train on; run the stages before this one again")

    def batches(self, batch_size: int, start: int, stop: int, rank: int, ranks: int) -> Iterator[Rows]:
        """Batches `start` to `stop` of this rank: latents (B, 4, h, w), embeddings (B, dim), captions (B), in half
        precision."""
        skip, needed = start * batch_size, (stop - start) * batch_size
        tasks: list[dict[str, str]] = []
        group: list[tuple[int, list[int], int]] = []
        grouped = 0
        for epoch, files in islice(self._windows(), rank, None, ranks):
            rows = sum(self.parts[file].rows for file in files)
            if skip >= rows:
                skip -= rows
                continue
            if needed <= 0:
                break
            group.append((epoch, files, skip))
            grouped += rows - skip
            needed -= rows - skip
            skip = 0
            if grouped >= self.window_rows or needed <= 0:
                tasks.append({"windows": json.dumps(group)})
                group, grouped = [], 0
        if not tasks:
            return
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            partial(_read_windows, self),
            batch_size=None,
            compute=TaskPoolStrategy(size=min(READERS, len(tasks))),
            num_cpus=READER_CPUS,
        )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        yield from islice(dataset.iter_batches(batch_size=batch_size, prefetch_batches=2), stop - start)

    def embeddings(self, limit: int) -> Float[Tensor, "row dim"]:
        """Sentence embeddings of at most `limit` rows, evenly taken from a few files; one caption of each."""
        parts = self.parts[:: max(1, len(self.parts) // SAMPLED_FILES)]
        stride = max(1, sum(part.rows for part in parts) // limit)
        found, seen = [], 0
        for part in parts:
            rows = _usable(self, part.name, ["key", "captions", "embeddings"])
            for row, allowed in rows[-seen % stride :: stride]:
                chosen = allowed[choose_caption(row["key"], len(allowed), 0, self.seed)]
                found.append(torch.from_numpy(np.array(row["embeddings"][chosen])).float())
            seen += len(rows)
        return torch.stack(found[:limit])

    def num_captions(self) -> int:
        """All captions of all rows."""
        return sum(len(allowed) for part in self.parts for _, allowed in _usable(self, part.name, ["key", "captions"]))

    def _windows(self) -> Iterator[tuple[int, list[int]]]:
        for epoch in count():
            files: list[int] = []
            for file in np.random.default_rng((self.seed, epoch)).permutation(len(self.parts)).tolist():
                files.append(file)
                if sum(self.parts[each].rows for each in files) >= self.window_rows:
                    yield epoch, files
                    files = []
            if sum(self.parts[each].rows for each in files):
                yield epoch, files


def _read_windows(stream: Stream, batch: Rows) -> Iterator[Rows]:
    """The shuffled rows of a task's windows, each row with the caption chosen for its epoch."""
    for row in batch["windows"]:
        for epoch, files, skip in json.loads(row):
            columns = ["key", "captions", "embeddings", "latents"]
            usable = [each for file in files for each in _usable(stream, stream.parts[file].name, columns)]
            order = np.random.default_rng((stream.seed, epoch, files[0])).permutation(len(usable))[skip:]
            rows = [usable[index] for index in order]
            chosen = [allowed[choose_caption(r["key"], len(allowed), epoch, stream.seed)] for r, allowed in rows]
            yield {
                "latents": np.stack([row["latents"] for row, _ in rows]),
                "embeddings": np.stack(
                    [row["embeddings"][index] for (row, _), index in zip(rows, chosen, strict=True)]
                ),
                "captions": np.array([row["captions"][index] for (row, _), index in zip(rows, chosen, strict=True)]),
            }


def _usable(stream: Stream, part: str, columns: list[str]) -> list[tuple[dict[str, Any], list[int]]]:
    """Rows of a file that the stream uses, each with the captions that it may use."""
    rows = read_part(stream.encoded, part, columns)
    if stream.assigned is None:
        return [(row, list(range(len(row["captions"])))) for row in rows]
    codes = {row["key"]: row["codes"] for row in read_part(stream.assigned, part, ["key", "codes"])}
    allowed = [(row, [i for i, code in enumerate(codes[row["key"]]) if code == stream.code]) for row in rows]
    return [(row, captions) for row, captions in allowed if captions]


def read_part(store: Store, part: str, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of one file as dictionaries; tensors are numpy arrays."""
    with store.open_file(part) as stream:
        table = pq.read_table(stream, columns=columns)
    rows: list[Any] = list(BlockAccessor.for_block(table).iter_rows(public_row_format=True))
    return rows


def parts_of(encoded: Store) -> tuple[Part, ...]:
    """Every file of an encoded data set with its number of rows."""

    def measure(name: str) -> Part:
        with encoded.open_file(name) as stream:
            return Part(name, pq.read_metadata(stream).num_rows)

    names = encoded.require("*.parquet", "root, or run the encode job first")
    with ThreadPoolExecutor(16) as threads:
        return tuple(threads.map(measure, names))


def latent_size(encoded: Store) -> tuple[int, int]:
    """Height and width of the latents of an encoded data set."""
    name = next(map(str, encoded.require("*.parquet", "root, or run the encode job first")))
    height, width = read_part(encoded, name, ["latents"])[0]["latents"].shape[1:]
    return height, width


def parts_by_code(assigned: Store, num_codes: int) -> list[tuple[Part, ...]]:
    """For each code, every file with the number of its rows that have a caption of that code."""

    def measure(name: str) -> list[int]:
        rows = [set(row["codes"]) for row in read_part(assigned, name, ["codes"])]
        return [sum(code in each for each in rows) for code in range(num_codes)]

    names = assigned.require("*.parquet", "root, or run the assign job first")
    with ThreadPoolExecutor(16) as threads:
        counts = list(threads.map(measure, names))
    return [tuple(map(Part, names, of_code)) for of_code in zip(*counts, strict=True)]
