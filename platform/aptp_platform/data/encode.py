"""Captioned images to latents and sentence embeddings: read and decoded in tasks, encoded in actors, written by tasks.

The result of a row depends on the row alone: not on its neighbours, the number of actors or the order of arrival. Files
are done in waves; a finished wave is on record, so a job that starts again after a failure goes on behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import ray.exceptions
import torch

from aptp.latents import encode_images
from aptp.prompts import PromptEncoder
from aptp_platform.config import EncodeConfig, ModelConfig, RunConfig, StorageConfig
from aptp_platform.data.captions import READER_CPUS, decode_rows, read_captioned, source_files
from aptp_platform.data.encoded import FAULTS, encoded_table, write_rows
from aptp_platform.models import check_pipeline, fetch_model, load_vae
from aptp_platform.progress import Progress
from aptp_platform.storage import Store

FILES_A_WAVE = 256
PARTIAL = ".partial"
QUARANTINE = "quarantine.parquet"


@dataclass(frozen=True)
class Split:
    """One of the two data sets, and the files it comes from."""

    name: str
    pattern: str
    files: tuple[str, ...]


def encode(config: RunConfig) -> dict[str, Any]:
    """Encode both splits into `encoded/train` and `encoded/heldout`; bad rows go to `encoded/quarantine.parquet`.

    Returns:
        rows of each split, and how many were bad by cause.

    Raises:
        ValueError: nothing to read, a model that is not whole, or more bad rows or bad files than
            `data.max_bad_share` of all; then nothing is published but the quarantine.
    """
    splits = [_split(config, name) for name in ("train", "heldout")]
    check_pipeline(config.model, config.storage)
    store = Store.open(config.root, config.storage).join("encoded")
    rows, faults = {}, {}
    for split in splits:
        rows[split.name], faults[split.name] = _encode_split(config, split, store)
    with store.open_file(QUARANTINE, "wb") as stream:
        pq.write_table(pa.concat_tables(faults.values()), stream)
    for split in splits:
        _check_share(config, split, rows[split.name], faults[split.name], store)
    for split in splits:
        for wave in _waves(split):
            store.remove(_record(split, wave))  # first: what is moved must not be taken for still there
        store.move(f"{PARTIAL}/{split.name}", split.name)
    store.remove(PARTIAL)
    causes = Counter(cause for table in faults.values() for cause in table["cause"].to_pylist())
    return {"rows": rows["train"], "held-out rows": rows["heldout"], "bad rows": causes.total(), "causes": dict(causes)}


def encoded_rows(config: RunConfig, pattern: str, files: slice = slice(None)) -> ray.data.Dataset:
    """The stream of encoded rows, with no cache: the columns of `encoded_table`, and `fault` and `detail`."""
    settings: EncodeConfig = config.encode
    read = read_captioned(config.data, config.storage, pattern, files)
    decoded = read.map_batches(
        partial(decode_rows, config.data.image_size),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        num_cpus=READER_CPUS,
    )
    encoded = decoded.map_batches(
        Encoder,
        fn_constructor_args=(config.model, config.storage, settings.gpus_per_actor > 0),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=settings.actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
    )
    encoded.context.execution_options.preserve_order = True
    encoded.context.raise_original_map_exception = True
    encoded.context.enable_progress_bars = False
    return encoded


class Encoder:
    """The autoencoder and the prompt encoder in one actor."""

    def __init__(self, model: ModelConfig, storage: StorageConfig, on_gpu: bool) -> None:
        device = "cuda" if on_gpu else "cpu"
        self.vae = load_vae(model, storage).to(device)
        self.prompts = PromptEncoder.load(fetch_model(model.prompt_encoder, storage)).to(device)

    def __call__(self, table: pa.Table) -> pa.Table:
        pixels = torch.from_numpy(table["image"].combine_chunks().to_numpy_ndarray())
        latents = encode_images(self.vae, pixels.to(self.vae.device).float() / 127.5 - 1).cpu().half().numpy()
        captions = table["captions"].to_pylist()
        faults, details = table["fault"].to_pylist(), table["detail"].to_pylist()
        for row, finite in enumerate(np.isfinite(latents).all((1, 2, 3))):
            if not finite and not faults[row]:
                faults[row], details[row] = (
                    "image",
                    "the autoencoder gives numbers that are not finite in half precision",
                )
        encoded = encoded_table(
            table["position"], table["key"], latents, captions, self._embed(captions), table["tags"]
        )
        return encoded.append_column("fault", pa.array(faults)).append_column("detail", pa.array(details))

    def _embed(self, captions: list[list[str]]) -> list[np.ndarray]:
        flat = [text for each in captions for text in each]
        embedded = (
            self.prompts.encode(flat).cpu().half().numpy() if flat else np.empty((0, self.prompts.dim), np.float16)
        )
        return np.split(embedded, np.cumsum([len(each) for each in captions])[:-1])


def _encode_split(config: RunConfig, split: Split, store: Store) -> tuple[int, pa.Table]:
    """All waves of a split into the partial folder; those on record are not done again."""
    target = store.join(PARTIAL, split.name)
    rows, faults = 0, []
    with Progress(f"encode {split.name}", len(split.files)) as progress:
        for wave in _waves(split):
            files = split.files[wave]
            record = _record(split, wave)
            known = store.read_json(record) if store.exists(record) else None
            if known is None or known["files"] != list(files):
                for part in target.list("part-*"):
                    if wave.start <= int(part.split("-")[1]) < wave.stop:
                        target.remove(part)
                known = _encode_wave(config, split, wave, target, progress)
                store.write_json(record, known)
            rows += known["rows"]
            faults.append(pa.Table.from_pylist(known["faults"], FAULTS))
            progress.update(min(wave.stop, len(split.files)), images=rows, bad=sum(map(len, faults)))
    return rows, pa.concat_tables(faults)


def _encode_wave(config: RunConfig, split: Split, wave: slice, target: Store, progress: Progress) -> dict[str, Any]:
    written = encoded_rows(config, split.pattern, wave).map_batches(
        partial(write_rows, target),
        batch_size=config.encode.rows_per_file,
        batch_format="pyarrow",
        num_cpus=READER_CPUS,
    )
    rows, faults = 0, []
    with plain_errors():
        for table in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for each in table.to_pylist():
                rows += each["rows"]
                faults += each["faults"]
                progress.update(each["place"], images=rows, bad=len(faults))
    return {"files": list(split.files[wave]), "rows": rows, "faults": faults}


def _check_share(config: RunConfig, split: Split, rows: int, faults: pa.Table, store: Store) -> None:
    """Bad rows are held against all rows, bad files against all files: a lost file is more than one lost row."""
    causes = faults["cause"].to_pylist()
    allowed = config.data.max_bad_share
    files = causes.count("shard")
    for kind, bad, total in (
        ("files", files, len(split.files)),
        ("rows", len(causes) - files, rows + len(causes) - files),
    ):
        if bad > allowed * total:
            worst = next(row for row in faults.to_pylist() if (row["cause"] == "shard") == (kind == "files"))
            raise ValueError(
                f"data.{split.name}: {bad} of {total} {kind} are bad, data.max_bad_share allows {allowed:g}: first "
                f"{worst['key']}: {worst['cause']}: {worst['detail']}; all are listed in {store.uri}/{QUARANTINE}: "
                "repair them, or allow more"
            )
    if not rows:
        raise ValueError(f"data.{split.name}: {split.pattern!r}: no row came of {len(split.files)} files; name others")


def _split(config: RunConfig, name: str) -> Split:
    pattern = getattr(config.data, name)
    return Split(name, pattern, tuple(source_files(config.data, config.storage, pattern)))


def _waves(split: Split) -> list[slice]:
    starts = range(0, len(split.files), FILES_A_WAVE)
    return [slice(start, start + FILES_A_WAVE) for start in starts]


def _record(split: Split, wave: slice) -> str:
    return f"{PARTIAL}/{split.name}-{wave.start:06d}.json"


@contextmanager
def plain_errors() -> Iterator[None]:
    """A ValueError of a worker as a ValueError here, with its one line and without what Ray adds to it."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause).partition("\nFailed to apply")[0]) from None
        raise
