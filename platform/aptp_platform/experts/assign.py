"""Every caption to its code, by the trained router: file by file beside the encoded rows, in the same order.

A code with too few prompts makes no expert. Either the job fails, or the code is dropped and each of its prompts goes
to its next best code. The router with the codes that are kept is published here; `refit` starts from it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from aptp.router import Router
from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.data.encode import translated_errors
from aptp_platform.data.encoded import READER_CPUS, read_parquet_file, write_table
from aptp_platform.run.layout import ASSIGNED, ROUTER, SHARED, TRAIN_ROWS, home
from aptp_platform.run.progress import Progress
from aptp_platform.storage.store import Store

_ROUTED = pa.schema({"usage": pa.list_(pa.int64()), "familiarity": pa.list_(pa.int64())})
_BINS = 1000  # of the cosines from -1 to 1
_UNFAMILIAR = 0.01  # the share of training captions that counts as unfamiliar


def assign(config: RunConfig) -> dict[str, Any]:
    """Route the captions of the encoded training rows into `assigned/`: `router/`, and a file for each of their files
    with the key and a code for each caption.

    Returns:
        `shares`: each code's share of all captions. `kept`: which of the pruned router's codes they are. `familiar`:
        the familiarity that 99 % of the captions reach.

    Raises:
        ConfigError: a code has fewer prompts than `assign.min_prompts`, or there is nothing to route.
    """
    root = Store.open(config.root, config.storage)
    encoded, target = home(config, "encode").join(TRAIN_ROWS), root.join(ASSIGNED)
    names = encoded.require("*.parquet", "root, or run the encode job first")
    root.remove(ASSIGNED)
    with tempfile.TemporaryDirectory() as scratch:
        router = Router.load(home(config, "share").join(SHARED).fetch(ROUTER, scratch))
    _publish(router, target)
    (usage, familiarity), least = _route_all(config, encoded, target, names), config.assign.min_prompts
    kept = list(range(router.num_codes))
    if few := [code for code in kept if usage[code] < least]:
        found = f"code {few[0]} has {usage[few[0]]} of {usage.sum()} prompts"
        if config.assign.if_fewer == "fail" or usage.sum() < least:
            root.remove(ASSIGNED)
            raise ConfigError(
                f"assign.min_prompts: {least}: {found}: lower it, set assign.if_fewer to merge, lower "
                "router.num_codes, or prune longer"
            )
        print(f"[assign] {found}, assign.min_prompts is {least}: codes {few} are merged into the nearest of the others")
        # Once is enough: codes that are kept can only gain prompts. If none has enough, all prompts go to the largest.
        kept = [code for code in kept if code not in few] or [int(usage.argmax())]
        _publish(router.keeping(kept), target)
        usage, familiarity = _route_all(config, encoded, target, names)
    shares = (usage / usage.sum()).round(6).tolist()
    below = np.cumsum(familiarity) / usage.sum()
    familiar = float(np.linspace(-1, 1, _BINS + 1)[np.argmax(below > _UNFAMILIAR)])
    captions = int(usage.sum())
    return {"captions": captions, "codes": len(kept), "shares": shares, "kept": kept, "familiar": round(familiar, 4)}


class Assigner:
    """The router in an actor: it routes the captions of the files that it gets by name."""

    def __init__(self, encoded: Store, target: Store) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.router = Router.load(target.fetch(ROUTER, scratch)).eval()
        self.encoded, self.target = encoded, target

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return pa.Table.from_pylist([self._route(str(name)) for name in batch["name"]], _ROUTED)

    def _route(self, name: str) -> dict[str, list[int]]:
        with read_parquet_file(self.encoded, name) as stream:
            table = pq.read_table(stream, columns=["key", "embeddings"], page_checksum_verification=True)
        embeddings = table["embeddings"].combine_chunks().to_pylist()
        rows = torch.from_numpy(np.concatenate(embeddings)).float()
        routes = self.router.route_embeddings(rows)
        familiarity = torch.histc(self.router.familiarity(rows), _BINS, -1, 1)
        codes = np.split(routes.indices.numpy(), np.cumsum([len(each) for each in embeddings])[:-1])
        write_table(self.target, name, pa.table({"key": table["key"], "codes": pa.array(codes, pa.list_(pa.int64()))}))
        usage = torch.bincount(routes.indices, minlength=self.router.num_codes)
        return {"usage": usage.tolist(), "familiarity": familiarity.long().tolist()}


def _publish(router: Router, target: Store) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        router.save(Path(scratch) / ROUTER)
        target.publish(Path(scratch) / ROUTER, ROUTER, last=("router.json",))


def _route_all(config: RunConfig, encoded: Store, target: Store, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """How many captions each code of the router in `target` gets, and a histogram of how familiar they are to it;
    their codes are written too."""
    items = [{"name": name} for name in names]
    routed = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Assigner,
        fn_constructor_args=(encoded, target),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(config.encode.actors, len(names))),
        num_cpus=READER_CPUS,
    )
    routed.context.raise_original_map_exception = True
    routed.context.enable_progress_bars = False
    usage: Any = 0
    familiarity: Any = 0
    done = 0
    with translated_errors(), Progress("assign", len(names)) as progress:
        for batch in routed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in cast(pa.Table, batch).to_pylist():
                usage = usage + np.array(row["usage"])
                familiarity = familiarity + np.array(row["familiarity"])
                done += 1
                progress.update(done, captions=int(usage.sum()))
    return usage, familiarity
