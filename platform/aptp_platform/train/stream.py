"""The rows that a worker trains on, streamed from the encoded Parquet by Ray Data, in an order that its place decides.

    epoch e     the rows of all files, the files in an order drawn from (seed, e)
    the stream  epoch 0, epoch 1, ... without end, cut into windows of n batches of B rows, all ranks together
    a window    is cut into B pieces of n rows, each shuffled by (seed, window); batch i has the i-th row of each piece
    rank r      of R has the r-th R-th of every batch, hence reads the r-th R-th of every window

So the batches are the same, row for row, for any number of ranks that divides B, and no rank reads what another trains
on. Every rank has as many batches as it wants, and a run that goes on from step s starts reading where step s reads.
Ray Train's own split of a dataset starts at its first row in every execution, which is why a worker asks for its rows
itself.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import ray.data
import ray.exceptions
import torch
from jaxtyping import Float, Int
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from torch import Tensor

from aptp_platform.config import ConfigError
from aptp_platform.data.encoded import choose_caption, read_parquet_file, read_table, row_identity
from aptp_platform.storage.errors import DamagedError
from aptp_platform.storage.store import Store
from aptp_platform.train.source import LatentEncoder, Source

READERS = 2  # tasks of a worker that read ahead
READER_CPUS = 0.05
GROUP_ROWS = 256  # that leave a reading task together ...
BLOCK_BYTES = 8 << 20  # ... or several groups, if they are small
SAMPLED_FILES = 16

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class EncodedFile:
    """One Parquet file and how many of its rows the stream uses."""

    name: str
    rows: int


@dataclass(frozen=True)
class Stream:
    """Rows of `encoded`, or those of them with a caption that `assigned` gives to `code`, with such a caption."""

    encoded: Store
    files: tuple[EncodedFile, ...]
    seed: int
    assigned: Store | None = None
    code: int | None = None
    window_rows: int = 8192  # at most: what is shuffled together, and what the reading tasks of all ranks hold
    prefetch_bytes: int = 256_000_000  # of rows on their way to a worker, in the object store
    source: Source | None = None  # of the images, where `encoded` holds no latents

    def __post_init__(self) -> None:
        if not sum(file.rows for file in self.files):
            of = "" if self.code is None else f" of code {self.code}"
            raise ConfigError(f"{self.encoded.uri}: holds no row{of} to train on; run the stages before this one again")

    def batches(self, batch_size: int, start: int, stop: int, rank: int, ranks: int) -> Iterator[Rows]:
        """Batches `start` to `stop` of this rank: latents (B, 4, h, w) and embeddings (B, dim) in half precision,
        captions (B), rows (B): the identity of each row, another one in each epoch.

        Args:
            batch_size: rows of all ranks together, a multiple of their number: B = batch_size / ranks.
        """
        if start >= stop:
            return
        reader = _Reader(self, batch_size, rank, ranks)
        windows = range(start // reader.batches, ceil(stop / reader.batches))
        tasks = [{"window": window, "skip": max(0, start - window * reader.batches)} for window in windows]
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            reader,
            batch_size=None,
            compute=TaskPoolStrategy(size=min(READERS, len(tasks))),
            num_cpus=READER_CPUS,
        )
        if self.source is not None:
            settings = self.source.encode
            dataset = dataset.map_batches(
                LatentEncoder,
                fn_constructor_args=(self.source,),
                batch_size=settings.batch_size,
                compute=ActorPoolStrategy(size=settings.actors),
                num_cpus=settings.cpus_per_actor,
                num_gpus=settings.gpus_per_actor,
            )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        dataset.context.target_max_block_size = BLOCK_BYTES
        dataset.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
            object_store_memory=self.prefetch_bytes
        )
        dataset.context.raise_original_map_exception = True
        try:
            yield from islice(dataset.iter_batches(batch_size=batch_size // ranks, prefetch_batches=2), stop - start)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DamagedError):
                raise DamagedError(str(error.cause).partition("\nFailed to apply")[0]) from None
            raise

    def embeddings(self, limit: int) -> Float[Tensor, "row dim"]:
        """Sentence embeddings of at most `limit` rows, evenly taken from a few files; one caption of each."""
        files = self.files[:: max(1, len(self.files) // SAMPLED_FILES)]
        stride = max(1, sum(file.rows for file in files) // limit)
        found, seen = [], 0
        for file in files:
            rows = _usable(self, file.name, ["key", "captions", "embeddings"])
            for row, allowed in rows[-seen % stride :: stride]:
                chosen = allowed[choose_caption(row["key"], len(allowed), 0, self.seed)]
                found.append(torch.from_numpy(np.array(row["embeddings"][chosen])).float())
            seen += len(rows)
        return torch.stack(found[:limit])

    def num_captions(self) -> int:
        """All captions of all rows."""
        return sum(len(allowed) for file in self.files for _, allowed in _usable(self, file.name, ["key", "captions"]))

    def read(self, start: int, stop: int, columns: list[str]) -> list["_Drawn"]:
        """What stands in the stream from one place to another, each row with the caption of its epoch."""
        return [
            _Drawn(row, allowed[choose_caption(row["key"], len(allowed), epoch, self.seed)], epoch)
            for epoch, file, rows in self._pieces(start, stop)
            for row, allowed in _usable(self, self.files[file].name, columns, rows)
        ]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, slice]]:
        """Epoch, file and rows of what stands in the stream from one place to another."""
        length = sum(file.rows for file in self.files)
        for epoch in range(start // length, ceil(stop / length)):
            place = epoch * length
            for file in np.random.default_rng((self.seed, epoch)).permutation(len(self.files)).tolist():
                rows = self.files[file].rows
                piece = slice(max(start - place, 0), min(stop - place, rows))
                if piece.start < piece.stop:
                    yield epoch, file, piece
                place += rows
                if place >= stop:
                    return


class _Drawn(NamedTuple):
    row: dict[str, Any]
    caption: int
    epoch: int


class _Reader:
    """What a reading task does: a rank's share of some windows becomes the rows of its batches, batch after batch.

    batches: that a window gives.
    """

    def __init__(self, stream: Stream, batch_size: int, rank: int, ranks: int) -> None:
        self.stream, self.batch_size = stream, batch_size
        self.share = batch_size // ranks
        self.first = rank * self.share  # of the pieces that are this rank's
        rows = min(stream.window_rows, sum(file.rows for file in stream.files))
        self.batches = max(1, rows // batch_size)

    def __call__(self, tasks: Rows) -> Iterator[Rows]:
        columns = ["key", "captions", "embeddings", "position" if self.stream.source else "latents"]
        for window, skip in zip(tasks["window"].tolist(), tasks["skip"].tolist(), strict=True):
            start = (window * self.batch_size + self.first) * self.batches
            read = self.stream.read(start, start + self.share * self.batches, columns)
            rows = [read[index] for index in self._order(window)[skip:].flatten()]
            for group in range(0, len(rows), GROUP_ROWS):
                yield _columns(self.stream, rows[group : group + GROUP_ROWS])

    def _order(self, window: int) -> Int[np.ndarray, "batch piece"]:
        """Which rows of this rank's share of a window are its batches."""
        places = np.arange(self.batch_size * self.batches).reshape(self.batch_size, self.batches)
        shuffled = np.random.default_rng((self.stream.seed, window)).permuted(places, axis=1)
        return shuffled[self.first : self.first + self.share].T - self.first * self.batches


def _columns(stream: Stream, drawn: list[_Drawn]) -> Rows:
    name = "latents" if stream.source is None else "pixels"
    images = [row["latents"] if stream.source is None else stream.source.pixels(row["image"]) for row, *_ in drawn]
    return {
        name: np.stack(images),
        "embeddings": np.stack([row["embeddings"][caption] for row, caption, _ in drawn]),
        "captions": np.array([row["captions"][caption] for row, caption, _ in drawn]),
        "rows": np.array([row_identity(row["key"], epoch) for row, _, epoch in drawn], np.int64),
    }


def _usable(
    stream: Stream, file: str, columns: list[str], which: slice = slice(None)
) -> list[tuple[dict[str, Any], list[int]]]:
    """Rows of a file that the stream uses, or those of them in a slice, each with the captions that it may use."""
    rows = read_table(stream.encoded, file, columns)
    usable = [(row, list(range(len(row["captions"])))) for row in rows]
    if stream.assigned is not None:
        codes = {row["key"]: row["codes"] for row in read_table(stream.assigned, file, ["key", "codes"])}
        allowed = [(row, [i for i, code in enumerate(codes[row["key"]]) if code == stream.code]) for row in rows]
        usable = [(row, captions) for row, captions in allowed if captions]
    usable = usable[which]
    if stream.source is not None and "position" in columns:
        images = stream.source.images([row["position"] for row, _ in usable])
        for row, _ in usable:
            row["image"] = images[row["position"]]
    return usable


def files_of(encoded: Store) -> tuple[EncodedFile, ...]:
    """Every file of an encoded data set with its number of rows."""

    def measure(name: str) -> EncodedFile:
        with read_parquet_file(encoded, name) as stream:
            return EncodedFile(name, pq.read_metadata(stream).num_rows)

    names = encoded.require("*.parquet", "root, or run the encode job first")
    with ThreadPoolExecutor(16) as threads:
        return tuple(threads.map(measure, names))


def files_by_code(assigned: Store, num_codes: int) -> list[tuple[EncodedFile, ...]]:
    """For each code, every file with the number of its rows that have a caption of that code."""

    def measure(name: str) -> list[int]:
        rows = [set(row["codes"]) for row in read_table(assigned, name, ["codes"])]
        return [sum(code in each for each in rows) for code in range(num_codes)]

    names = assigned.require("*.parquet", "root, or run the assign job first")
    with ThreadPoolExecutor(16) as threads:
        counts = list(threads.map(measure, names))
    return [tuple(map(EncodedFile, names, of_code)) for of_code in zip(*counts, strict=True)]
