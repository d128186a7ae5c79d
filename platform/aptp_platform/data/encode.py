"""Captioned images to latents and sentence embeddings: read and decoded in tasks, encoded in actors, written by tasks.

The result of a row depends on the row alone: not on its neighbours, the number of actors or the order of arrival. Files
are processed in waves. Each finished wave is recorded, so a job that is restarted continues after the last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import ray.exceptions
import torch

from aptp.latents import encode_images
from aptp.prompts import PromptEncoder
from aptp_platform.config import ModelConfig, RunConfig
from aptp_platform.data.captions import (
    READER_CPUS,
    SourceFile,
    check_rows,
    decode_rows,
    read_captioned,
    source_files,
)
from aptp_platform.data.encoded import FAULTS, encoded_table, write_rows
from aptp_platform.models import check_pipeline, fetch_model, load_vae
from aptp_platform.run.facts import Facts
from aptp_platform.run.layout import ENCODED
from aptp_platform.run.progress import Progress
from aptp_platform.run.resources import require_room
from aptp_platform.storage.store import StorageConfig, Store

BLOCK_BYTES = 4 << 20  # size of a block: small, so that every actor gets work early and rows are written early
PARTIAL = ".partial"
QUARANTINE = "quarantine.parquet"


def encode(config: RunConfig, known: Facts | None = None) -> dict[str, Any]:
    """Encode both splits into `encoded/train` and `encoded/heldout`; bad rows go to `encoded/quarantine.parquet`.

    Args:
        known: what the rows depend on, if it has been listed.

    Returns:
        rows of each split, and how many were bad by cause.

    Raises:
        ValueError: nothing to read, a model that is not whole, or a larger share of bad rows or
            files than `data.max_bad_share`; then only the quarantine is published.
    """
    known = known or Facts(config)
    files = source_files(config.data, config.storage, known.data)
    check_rows(config.data, config.storage, files)
    check_pipeline(config.model, config.storage)
    shares = {
        "CPU": ("cpus_per_actor", config.encode.cpus_per_actor),
        "GPU": ("gpus_per_actor", config.encode.gpus_per_actor),
    }
    require_room("encode", "actors", config.encode.actors, shares, spare=READER_CPUS)
    store = Store.open(config.root, config.storage).join(ENCODED)
    written = _encode_waves(config, files, store, known.of("encode"))
    faults = [fault for part in written for fault in part["faults"]]
    with store.open_file(QUARANTINE, "wb") as stream:
        pq.write_table(pa.Table.from_pylist(faults, FAULTS), stream)
    rows = {"train": 0, "heldout": 0}
    for split in rows:
        parts = [part for part in written if part["split"] == split]
        rows[split] = sum(part["rows"] for part in parts)
        bad = [fault for part in parts for fault in part["faults"]]
        _check_share(config, split, [file for file in files if file.split == split], rows[split], bad, store)
    store.remove(f"{PARTIAL}/origin.json")  # first, so that a restart does not trust files that were already moved
    for split in rows:
        store.move(f"{PARTIAL}/{split}", split)
    store.remove(PARTIAL)
    causes = Counter(fault["cause"] for fault in faults)
    return {"rows": rows["train"], "held-out rows": rows["heldout"], "bad rows": causes.total(), "causes": dict(causes)}


def encoded_rows(config: RunConfig, files: Sequence[SourceFile]) -> ray.data.Dataset:
    """The stream of encoded rows, with no cache: the columns of `encoded_table`, and `split`, `fault`, `detail`."""
    settings = config.encode
    readers, actors = min(settings.readers, len(files)), min(settings.actors, len(files))
    decoded = read_captioned(config.data, config.storage, files, readers).map_batches(
        partial(decode_rows, config.data.image_size),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=readers),
        num_cpus=READER_CPUS,
    )
    encoded = decoded.map_batches(
        Encoder,
        fn_constructor_args=(config.model, config.storage, settings.gpus_per_actor > 0, settings.cache_latents),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
    )
    encoded.context.execution_options.preserve_order = True
    encoded.context.target_max_block_size = BLOCK_BYTES
    encoded.context.raise_original_map_exception = True
    encoded.context.enable_progress_bars = False
    return encoded


class Encoder:
    """The autoencoder and the prompt encoder in one actor.

    Without `latents`, training rows get none: their first is encoded to learn the shape, the others are zeros, which
    `write_rows` drops.
    """

    def __init__(self, model: ModelConfig, storage: StorageConfig, on_gpu: bool, latents: bool = True) -> None:
        self._latents = latents
        device = "cuda" if on_gpu else "cpu"
        self.vae = load_vae(model, storage).to(device)
        self.prompts = PromptEncoder.load(fetch_model(model.prompt_encoder, storage)).to(device)

    def __call__(self, table: pa.Table) -> pa.Table:
        pixels, wanted = table["image"].combine_chunks().to_numpy_ndarray(), np.arange(len(table))
        if not self._latents:
            wanted = np.flatnonzero(np.array(table["split"].to_pylist()) == "heldout")
            wanted = np.union1d(wanted, [0])
        encoded_now = half_latents(self.vae, pixels[wanted])
        latents = np.zeros((len(table), *encoded_now.shape[1:]), np.float16)
        latents[wanted] = encoded_now
        captions = table["captions"].to_pylist()
        faults, details = table["fault"].to_pylist(), table["detail"].to_pylist()
        finite = np.isfinite(latents).reshape(len(latents), -1).all(1)
        for row in map(int, np.flatnonzero(~finite)):
            if not faults[row]:
                faults[row], details[row] = "image", "the autoencoder's numbers are not finite in half precision"
        encoded = encoded_table(
            table["position"], table["key"], latents, captions, self._embed(captions), table["tags"]
        )
        for name, column in (("split", table["split"]), ("fault", pa.array(faults)), ("detail", pa.array(details))):
            encoded = encoded.append_column(name, column)
        return encoded

    def _embed(self, captions: list[list[str]]) -> list[np.ndarray]:
        flat = [text for each in captions for text in each]
        embedded = np.empty((0, self.prompts.dim), np.float16)
        if flat:
            embedded = self.prompts.encode(flat).cpu().half().numpy()
        return np.split(embedded, np.cumsum([len(each) for each in captions])[:-1])


def half_latents(vae: Any, pixels: np.ndarray) -> np.ndarray:
    """Latents in half precision of decoded images (row, 3, height, width), 0 to 255."""
    scaled = torch.tensor(pixels).to(vae.device).float() / 127.5 - 1
    latents: np.ndarray = encode_images(vae, scaled).cpu().half().numpy()
    return latents


def _encode_waves(
    config: RunConfig, files: Sequence[SourceFile], store: Store, origin: dict[str, Any]
) -> list[dict[str, Any]]:
    """Encode every wave that is not on record into the partial folder; returns what was written, and what was bad.

    Args:
        origin: what rows are made from; waves of another origin cannot be used.
    """
    record = f"{PARTIAL}/origin.json"
    if not store.exists(record) or store.read_json(record) != origin:
        store.remove(PARTIAL)
    partial_folder = store.join(PARTIAL)
    partial_folder.write_json("origin.json", origin)
    written: list[dict[str, Any]] = []
    size = config.encode.files_per_wave
    with Progress("encode", len(files)) as progress:
        for start in range(0, len(files), size):
            wave = files[start : start + size]
            record = f"wave-{start:06d}.json"
            if not partial_folder.exists(record):
                _remove_parts(partial_folder, wave)
                parts = []
                for part in _encode_wave(config, wave, partial_folder):
                    parts.append(part)
                    done = next(i for i, f in enumerate(files) if (f.split, f.place) == (part["split"], part["place"]))
                    progress.update(done, **_facts([*written, *parts]))
                partial_folder.write_json(record, parts)
            written += partial_folder.read_json(record)
            progress.update(start + len(wave), **_facts(written))
    return written


def _encode_wave(config: RunConfig, wave: Sequence[SourceFile], target: Store) -> Iterator[dict[str, Any]]:
    written = encoded_rows(config, wave).map_batches(
        partial(write_rows, target, () if config.encode.cache_latents else ("train",)),
        batch_size=config.encode.rows_per_file,
        batch_format="pyarrow",
        num_cpus=READER_CPUS,
    )
    with translated_errors():
        for batch in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from cast(pa.Table, batch).to_pylist()


def _remove_parts(partial_folder: Store, wave: Sequence[SourceFile]) -> None:
    """Remove what an interrupted wave has left."""
    ours = {(file.split, file.place) for file in wave}
    for part in partial_folder.list("*/part-*"):
        split, _, name = part.partition("/")
        if (split, int(name.split("-")[1])) in ours:
            partial_folder.remove(part)


def _facts(written: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {"images": sum(part["rows"] for part in written), "bad": sum(len(part["faults"]) for part in written)}


def _check_share(
    config: RunConfig, split: str, files: Sequence[SourceFile], rows: int, faults: list[dict[str, str]], store: Store
) -> None:
    """Bad rows are counted against all rows, bad files against all files: a lost file is more than one lost row."""
    allowed = config.data.max_bad_share
    bad_files = [fault for fault in faults if fault["cause"] == "shard"]
    bad_rows = [fault for fault in faults if fault["cause"] != "shard"]
    for kind, bad, total in (("files", bad_files, len(files)), ("rows", bad_rows, rows + len(bad_rows))):
        if len(bad) > allowed * total:
            first = bad[0]
            raise ValueError(
                f"data.{split}: {len(bad)} of {total} {kind} are bad, data.max_bad_share allows {allowed:g}: first "
                f"{first['key']}: {first['cause']}: {first['detail']}; all are listed in {store.uri}/{QUARANTINE}: "
                "repair them, or allow more"
            )
    if not rows:
        raise ValueError(f"data.{split}: {len(files)} files hold no row; name others")


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise a worker's ValueError as a ValueError here, with its one line and without what Ray adds to it."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause).partition("\nFailed to apply")[0]) from None
        raise
