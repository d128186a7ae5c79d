"""Every caption to its code, by the trained router: file by file beside the encoded rows, in the same order."""

from __future__ import annotations

import tempfile
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from aptp.router import Router, require_used
from aptp_platform.config import RunConfig
from aptp_platform.data.encode import plain_errors
from aptp_platform.data.encoded import READER_CPUS, write_part
from aptp_platform.progress import Progress
from aptp_platform.storage import Store

_ROUTED = pa.schema({"usage": pa.list_(pa.int64()), "familiarity": pa.list_(pa.int64())})
_BINS = 1000  # of the cosines from -1 to 1
_UNFAMILIAR = 0.01  # the share of training captions that counts as unfamiliar


def assign(config: RunConfig) -> dict[str, Any]:
    """Route the captions of `encoded/train` into `assigned/`, a file for each file: key, and a code for each caption.

    Returns:
        `shares`: each code's share of all captions. `familiar`: the familiarity that all but one in a hundred have.

    Raises:
        ValueError: a code that no caption is routed to; the line names it. Or there is nothing to route.
    """
    root = Store.open(config.root, config.storage)
    encoded, target = root.join("encoded", "train"), root.join("assigned")
    names = encoded.require("*.parquet", "root, or run the encode job first")
    root.remove("assigned")
    items = [{"name": name} for name in names]
    routed = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Assigner,
        fn_constructor_args=(root, encoded, target),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=config.encode.actors),
        num_cpus=READER_CPUS,
    )
    routed.context.raise_original_map_exception = True
    routed.context.enable_progress_bars = False
    usage: np.ndarray | int = 0
    familiarity: np.ndarray | int = 0
    done = 0
    with plain_errors(), Progress("assign", len(names)) as progress:
        for batch in routed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in cast(pa.Table, batch).to_pylist():
                usage = usage + np.array(row["usage"])
                familiarity = familiarity + np.array(row["familiarity"])
                done += 1
                progress.update(done, captions=int(np.sum(usage)))
    shares = torch.from_numpy(np.asarray(usage) / np.sum(usage))
    require_used(shares.float())
    below = np.cumsum(familiarity) / np.sum(usage)
    familiar = float(np.linspace(-1, 1, _BINS + 1)[np.argmax(below > _UNFAMILIAR)])
    return {
        "captions": int(np.sum(usage)),
        "shares": [round(share, 6) for share in shares.tolist()],
        "familiar": round(familiar, 4),
    }


class Assigner:
    """The router in an actor: it routes the files it is given the names of."""

    def __init__(self, root: Store, encoded: Store, target: Store) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.router = Router.load(root.fetch("pruned/router", scratch)).eval()
        self.encoded, self.target = encoded, target

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return pa.Table.from_pylist([self._route(str(name)) for name in batch["name"]], _ROUTED)

    def _route(self, name: str) -> dict[str, list[int]]:
        with self.encoded.open_file(name) as stream:
            table = pq.read_table(stream, columns=["key", "embeddings"])
        embeddings = table["embeddings"].combine_chunks().to_pylist()
        rows = torch.from_numpy(np.concatenate(embeddings)).float()
        routes = self.router.route_embeddings(rows)
        familiarity = torch.histc(self.router.familiarity(rows), _BINS, -1, 1)
        codes = np.split(routes.indices.numpy(), np.cumsum([len(each) for each in embeddings])[:-1])
        write_part(self.target, name, pa.table({"key": table["key"], "codes": pa.array(codes, pa.list_(pa.int64()))}))
        usage = torch.bincount(routes.indices, minlength=self.router.num_codes)
        return {"usage": usage.tolist(), "familiarity": familiarity.long().tolist()}
