"""Encoded captioned images as Parquet, and the one place where a caption is chosen among several.

    position int64, key str, latents half (4, h, w), captions list of str, embeddings half (captions, dim), tags json

Tensors are Arrow's and Ray Data's extension types, whose metadata is JSON: reading unpickles nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from jaxtyping import Float16
from ray.data.extensions import ArrowVariableShapedTensorArray

from aptp_platform.storage import Store

READER_CPUS = 0.1
READERS = 4
GROUP_ROWS = 256  # rows of a row group: what a reader holds
FAULTS = pa.schema({"key": pa.string(), "cause": pa.string(), "detail": pa.string()})
WRITTEN = pa.schema(
    {"split": pa.string(), "place": pa.int64(), "rows": pa.int64(), "faults": pa.list_(pa.struct(list(FAULTS)))}
)


def choose_caption(key: str, count: int, epoch: int, seed: int) -> int:
    """Which of an image's `count` captions an epoch uses: each once in `count` epochs, starting where (key, seed) says.

    A function of its arguments only, so the text states and the sentence embedding speak of the same caption wherever
    they are computed.
    """
    if count < 1:
        raise ValueError(f"{key}: has {count} captions; a row has at least one")
    start = int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "big")
    return (start + epoch) % count


def encoded_table(
    positions: Sequence[int],
    keys: Sequence[str],
    latents: Float16[np.ndarray, "row channel height width"],
    captions: Sequence[Sequence[str]],
    embeddings: Sequence[Float16[np.ndarray, "caption dim"]],
    tags: Sequence[str],
) -> pa.Table:
    """Rows as they are stored."""
    return pa.table(
        {
            "position": pa.array(positions, pa.int64()),
            "key": pa.array(keys, pa.string()),
            "latents": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(latents)),
            "captions": pa.array([list(each) for each in captions], pa.list_(pa.string())),
            "embeddings": ArrowVariableShapedTensorArray.from_numpy(list(embeddings)),
            "tags": pa.array(tags, pa.string()),
        }
    )


def write_part(store: Store, name: str, table: pa.Table) -> None:
    """One Parquet file, which appears when it is whole."""
    with store.open_file(name, "wb") as stream:
        pq.write_table(table, stream, row_group_size=GROUP_ROWS, compression="zstd", use_dictionary=False)


def write_rows(store: Store, table: pa.Table) -> pa.Table:
    """Good rows to a file of their split, named by its first row's position; returns what was written and was bad."""
    written = []
    for split in pc.unique(table["split"]).to_pylist():
        rows = table.filter(pc.equal(table["split"], split))
        good = rows.filter(pc.equal(rows["fault"], "")).drop_columns(["split", "fault", "detail"])
        bad = rows.filter(pc.not_equal(rows["fault"], "")).select(["key", "fault", "detail"])
        if len(good):
            place, row = divmod(good["position"][0].as_py(), 1 << 32)
            write_part(store, f"{split}/part-{place:06d}-{row:09d}.parquet", good)
        place = rows["position"][len(rows) - 1].as_py() >> 32
        faults = bad.rename_columns(FAULTS.names).to_pylist()
        written.append({"split": split, "place": place, "rows": len(good), "faults": faults})
    return pa.Table.from_pylist(written, WRITTEN)


def read_encoded(store: Store, columns: Sequence[str] | None = None) -> ray.data.Dataset:
    """The rows of every `*.parquet` here, streamed; tensors are numpy arrays in rows and in numpy batches.

    Raises:
        ValueError: there is no such file.
    """
    names = store.require("*.parquet", "root, or run the encode job first")
    items = [{"name": name} for name in names]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        partial(_read_parts, store, list(columns) if columns else None),
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=min(READERS, len(names))),
        num_cpus=READER_CPUS,
    )


def _read_parts(store: Store, columns: list[str] | None, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
    for name in batch["name"]:
        with store.open_file(str(name)) as stream:
            for group in pq.ParquetFile(stream).iter_batches(GROUP_ROWS, columns=columns):
                yield pa.Table.from_batches([group])
