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
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from torch import Tensor

from aptp_platform.config import ConfigError
from aptp_platform.data.encoded import choose_caption, latent_shape, read_part
from aptp_platform.storage import Store
from aptp_platform.train.source import LatentEncoder, Source

READERS = 2  # tasks of a worker that read ahead
READER_CPUS = 0.05
GROUP_ROWS = 256  # that leave a reading task together ...
BLOCK_BYTES = 8 << 20  # ... or several groups, if they are small
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
    window_rows: int = 8192  # that are shuffled together: a reading task holds them
    prefetch_bytes: int = 256_000_000  # of rows on their way to a worker, in the object store
    source: Source | None = None  # of the images, where `encoded` holds no latents

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
            columns = ["key", "captions", "embeddings", "position" if stream.source else "latents"]
            usable = [each for file in files for each in _usable(stream, stream.parts[file].name, columns)]
            order = np.random.default_rng((stream.seed, epoch, files[0])).permutation(len(usable))[skip:]
            for start in range(0, len(order), GROUP_ROWS):
                yield _chosen(stream, [usable[index] for index in order[start : start + GROUP_ROWS]], epoch)


def _chosen(stream: Stream, rows: list[tuple[dict[str, Any], list[int]]], epoch: int) -> Rows:
    """Rows as columns, each with its caption of this epoch."""
    captions = [allowed[choose_caption(row["key"], len(allowed), epoch, stream.seed)] for row, allowed in rows]
    picked = [(row, caption) for (row, _), caption in zip(rows, captions, strict=True)]
    name = "latents" if stream.source is None else "pixels"
    drawn = [row["latents"] if stream.source is None else stream.source.pixels(row["image"]) for row, _ in picked]
    return {
        name: np.stack(drawn),
        "embeddings": np.stack([row["embeddings"][caption] for row, caption in picked]),
        "captions": np.array([row["captions"][caption] for row, caption in picked]),
    }


def _usable(stream: Stream, part: str, columns: list[str]) -> list[tuple[dict[str, Any], list[int]]]:
    """Rows of a file that the stream uses, each with the captions that it may use."""
    rows = read_part(stream.encoded, part, columns)
    usable = [(row, list(range(len(row["captions"])))) for row in rows]
    if stream.assigned is not None:
        codes = {row["key"]: row["codes"] for row in read_part(stream.assigned, part, ["key", "codes"])}
        allowed = [(row, [i for i, code in enumerate(codes[row["key"]]) if code == stream.code]) for row in rows]
        usable = [(row, captions) for row, captions in allowed if captions]
    if stream.source is not None and "position" in columns:
        images = stream.source.images([row["position"] for row, _ in usable])
        for row, _ in usable:
            row["image"] = images[row["position"]]
    return usable


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
    _, height, width = latent_shape(encoded, encoded.require("*.parquet", "root, or run the encode job first")[0])
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
