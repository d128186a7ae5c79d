"""Encoded captioned images as Parquet, and the one place where a caption is chosen among several.

    position int64, key str, latents half (4, h, w), captions list of str, embeddings half (captions, dim), tags json

Rows may come without latents, which are then made from their images when they are used; the file says their shape.
Tensors are Arrow's and Ray Data's extension types, whose metadata is JSON: reading unpickles nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float16
from ray.data.block import BlockAccessor
from ray.data.extensions import ArrowVariableShapedTensorArray

from aptp_platform.storage.errors import DamagedError, StoreError
from aptp_platform.storage.store import Store

READER_CPUS = 0.1
READERS = 4
_SHAPE = b"latent_shape"
GROUP_ROWS = 256  # rows of a row group: what a reader holds
FAULTS = pa.schema({"key": pa.string(), "cause": pa.string(), "detail": pa.string()})
WRITTEN = pa.schema(
    {"split": pa.string(), "place": pa.int64(), "rows": pa.int64(), "faults": pa.list_(pa.struct(list(FAULTS)))}
)


def choose_caption(key: str, count: int, epoch: int, seed: int) -> int:
    """Which of an image's `count` captions an epoch uses: each once in `count` epochs; (key, seed) give the first.

    A function of its arguments only, so the text states and the sentence embedding belong to the same caption wherever
    they are computed.
    """
    if count < 1:
        raise ValueError(f"{key}: has {count} captions; a row has at least one")
    start = int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "big")
    return (start + epoch) % count


def row_identity(key: str, epoch: int) -> int:
    """63 bits that identify a row of an epoch: its noise is drawn from them (`aptp.Noise`)."""
    return int.from_bytes(hashlib.blake2b(f"{epoch} {key}".encode(), digest_size=8).digest(), "big") >> 1


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


def write_table(store: Store, name: str, table: pa.Table) -> None:
    """Write one Parquet file, atomically."""
    with store.open_file(name, "wb") as stream:
        pq.write_table(table, stream, row_group_size=GROUP_ROWS, compression="zstd", use_dictionary=False,
            write_page_checksum=True,
        )  # fmt: skip


def write_rows(store: Store, without_latents: Sequence[str], table: pa.Table) -> pa.Table:
    """Write good rows to a file of their split, named by its first row's position; returns what was written and bad.

    Args:
        without_latents: splits whose latents are not stored.
    """
    written = []
    for split in pc.unique(table["split"]).to_pylist():
        rows = table.filter(pc.equal(table["split"], split))
        good = rows.filter(pc.equal(rows["fault"], "")).drop_columns(["split", "fault", "detail"])
        bad = rows.filter(pc.not_equal(rows["fault"], "")).select(["key", "fault", "detail"])
        if len(good):
            place, row = divmod(good["position"][0].as_py(), 1 << 32)
            if split in without_latents:
                shape = json.dumps(good.schema.field("latents").type.shape).encode()
                good = good.drop_columns(["latents"]).replace_schema_metadata({_SHAPE: shape})
            write_table(store, f"{split}/part-{place:06d}-{row:09d}.parquet", good)
        place = rows["position"][len(rows) - 1].as_py() >> 32
        faults = bad.rename_columns(FAULTS.names).to_pylist()
        written.append({"split": split, "place": place, "rows": len(good), "faults": faults})
    return pa.Table.from_pylist(written, WRITTEN)


@contextmanager
def read_parquet_file(store: Store, name: str) -> Iterator[IO[bytes]]:
    """A Parquet file of the run as a stream, to be read in the block.

    Raises:
        DamagedError: it is not whole.
    """
    with store.open_file(name) as stream:
        try:
            yield stream
        except StoreError:
            raise
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:160]
            raise DamagedError(
                f"{store.uri}/{name}: is damaged ({type(error).__name__}: {reason}): bring it back from a copy, or run "
                "the job that wrote it with --restart"
            ) from None


def latent_shape(store: Store, name: str) -> tuple[int, ...]:
    """Channels, height and width of the latents of a file's rows, whether they are in it or not."""
    with read_parquet_file(store, name) as stream:
        schema = pq.read_schema(stream)
    if "latents" in schema.names:
        return tuple(schema.field("latents").type.shape)
    return tuple(json.loads(schema.metadata[_SHAPE]))


def latent_size(encoded: Store) -> tuple[int, int]:
    """Height and width of the latents of an encoded data set."""
    _, height, width = latent_shape(encoded, encoded.require("*.parquet", "root, or run the encode job first")[0])
    return height, width


def read_encoded(store: Store, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of every file here, in the files' order: for what is small, such as held-out rows.

    Raises:
        ValueError: there is no such file.
    """
    names = store.require("*.parquet", "root, or run the encode job first")
    with ThreadPoolExecutor(READERS) as threads:
        return [row for rows in threads.map(lambda name: read_table(store, name, columns), names) for row in rows]


def read_table(store: Store, name: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one file as dictionaries; tensors are numpy arrays."""
    with read_parquet_file(store, name) as stream:
        table = pq.read_table(stream, columns=list(columns) if columns else None, page_checksum_verification=True)
    rows: list[Any] = list(BlockAccessor.for_block(table).iter_rows(public_row_format=True))
    return rows
