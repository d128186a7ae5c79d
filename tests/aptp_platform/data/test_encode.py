"""Encoding is a function of the row alone, publishes all or nothing, and accounts for every bad row."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aptp.latents import encode_images
from aptp.prompts import PromptEncoder
from aptp_platform.config import ConfigError, DataConfig, EncodeConfig, ModelConfig, RunConfig
from aptp_platform.data.captions import source_files
from aptp_platform.data.encode import encode
from aptp_platform.data.encoded import latent_size, read_encoded, write_table
from aptp_platform.data.sample import decode_image
from aptp_platform.models import load_vae
from aptp_platform.storage.store import StorageConfig, Store
from aptp_platform.train.source import Source
from aptp_platform.train.stream import Stream, files_of
from tests.support.captioned import (
    IMAGE_SIZE,
    captions_of,
    image_bytes,
    sample,
    samples,
    tar_of,
    write_shards,
    write_text_encoder,
)
from tests.support.tiny_pipeline import build_pipeline

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder / "pipeline")
    prompts = write_text_encoder(folder / "prompts")
    return ModelConfig(pipeline=str(folder / "pipeline"), prompt_encoder=str(prompts))


@pytest.fixture(scope="module")
def config(model, tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("encode")
    write_shards(folder / "data", train=30, heldout=6)
    return RunConfig(
        root=str(folder / "run"),
        data=DataConfig(source=str(folder / "data"), image_size=IMAGE_SIZE),
        model=model,
        encode=EncodeConfig(batch_size=4, readers=1, rows_per_file=8),
    )


@pytest.fixture(scope="module")
def summary(config) -> dict[str, Any]:
    return encode(config)


def rows_of(config: RunConfig, split: str = "train") -> list[dict[str, Any]]:
    store = Store.open(config.root, config.storage).join("encoded", split)
    return sorted(read_encoded(store), key=lambda row: row["position"])


IN_ORDER = [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]


def test_rows_are_what_the_models_say_of_each_alone(config, summary):
    assert summary == {"rows": 30, "held-out rows": 6, "bad rows": 0, "causes": {}}
    assert Store.open(config.root).join("encoded").list("*") == ["quarantine.parquet"]
    vae = load_vae(config.model, config.storage)
    prompts = PromptEncoder.load(config.model.prompt_encoder)
    train, heldout = rows_of(config), rows_of(config, "heldout")
    assert [int(row["key"]) for row in train] == IN_ORDER
    assert [int(row["key"]) for row in heldout] == list(range(30, 36))
    for row in [*train, *heldout]:
        index = int(row["key"])
        assert row["captions"] == captions_of(index)
        pixels = torch.from_numpy(decode_image(image_bytes(index), IMAGE_SIZE))[None].float() / 127.5 - 1
        np.testing.assert_allclose(row["latents"], encode_images(vae, pixels)[0].numpy(), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(row["embeddings"], prompts.encode(captions_of(index)).numpy(), rtol=2e-3, atol=1e-3)
        assert row["latents"].dtype == row["embeddings"].dtype == np.float16


def test_without_a_cache_the_stream_encodes_the_same_rows_in_the_same_order(config, summary, tmp_path):
    live = replace(config, root=str(tmp_path / "live"), encode=replace(config.encode, cache_latents=False))
    assert encode(live) == summary
    cached, bare = (Store.open(each.root).join("encoded", "train") for each in (config, live))
    assert "latents" not in read_encoded(bare)[0]
    assert "latents" in rows_of(live, "heldout")[0]
    assert latent_size(bare) == latent_size(cached)

    names = tuple(file.name for file in source_files(live.data, live.storage) if file.split == "train")
    source = Source(live.data, live.storage, live.model, live.encode, names)
    ((ours,), (theirs,)) = (
        Stream(store, files_of(store), 3, window_rows=64, source=used).batches(30, 1, 2, 0, 1)
        for store, used in ((bare, source), (cached, None))
    )
    assert ours["captions"].tolist() == theirs["captions"].tolist()
    np.testing.assert_allclose(ours["latents"], theirs["latents"], rtol=2e-3, atol=1e-4)
    with pytest.raises(ConfigError, match=r"data.source: train-02.tar.gz: its row 77 is not what it was"):
        source.images([2 << 32, (2 << 32) + 77])


@contextmanager
def interrupted_once_there(store: Store, name: str) -> Iterator[None]:
    """^C, as soon as that file is there; also where a shell runs the suite in the background, which ignores ^C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        while not store.exists(name):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_bucket_interrupted_in_other_waves_batches_and_actors_gives_the_same_rows(config, summary, s3_server):
    storage = StorageConfig(endpoint=s3_server.endpoint)
    uri = s3_server.bucket("encode")
    bucket = Store.open(uri, storage)
    bucket.publish(config.data.source, "data")
    bucket.publish(config.model.pipeline, "model")
    remote = replace(
        config,
        root=f"{uri}/run",
        storage=storage,
        data=replace(config.data, source=f"{uri}/data"),
        model=replace(config.model, pipeline=f"{uri}/model"),
        encode=EncodeConfig(batch_size=7, readers=2, actors=2, rows_per_file=5, files_per_wave=2),
    )
    partial = bucket.join("run", "encoded", ".partial")
    with pytest.raises(KeyboardInterrupt), interrupted_once_there(partial, "wave-000000.json"):
        encode(remote)
    assert partial.list("wave-*") == ["wave-000000.json"], "it was in the second wave"
    assert not bucket.exists("run/encoded/train")
    first = partial.list("train/*")[0]
    with partial.open_file(first) as stream:
        table = pq.read_table(stream)
    marked = table.set_column(0, "position", pa.array([-1] * len(table)))
    write_table(partial, first, marked)

    assert encode(remote) == summary
    with bucket.join("run", "encoded").open_file(first) as stream:
        assert pq.read_table(stream)["position"].to_pylist() == [-1] * len(table), "a finished wave is not done again"
    write_table(bucket.join("run", "encoded"), first, table)
    assert not bucket.exists("run/encoded/.partial")
    for split in ("train", "heldout"):
        for ours, theirs in zip(rows_of(config, split), rows_of(remote, split), strict=True):
            for name in ("key", "position", "captions", "tags"):
                assert ours[name] == theirs[name]
            np.testing.assert_allclose(ours["latents"], theirs["latents"], rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(ours["embeddings"], theirs["embeddings"], rtol=2e-3, atol=1e-3)


def test_what_is_bad_is_counted_and_listed_and_skipped_up_to_the_share(config, tmp_path):
    def allow(share: float) -> RunConfig:
        data = replace(config.data, source=str(tmp_path / "data"), max_bad_share=share)
        return replace(config, root=str(tmp_path / "run"), data=data)

    write_shards(tmp_path / "data", train=30, heldout=6)
    (tmp_path / "data" / "train-01.tar.gz").write_bytes(b"not a tar at all")
    members = samples(range(100, 120))
    members += sample(200, image=b"no image") + sample(201, captions=[" "]) + sample(202, image=image_bytes(202)[:70])
    (tmp_path / "data" / "train-03.tar").write_bytes(tar_of(members))
    encoded = Store.open(tmp_path / "run" / "encoded")
    with pytest.raises(ValueError, match=r"1 of 4 files are bad, .* first train-01.tar.gz: shard: ReadError"):
        encode(allow(0.01))
    (tmp_path / "data" / "train-01.tar.gz").unlink()  # other files: done again
    with pytest.raises(ValueError, match=r"3 of 43 rows are bad, data.max_bad_share allows 0.01: first 00200: image: "):
        encode(allow(0.01))
    assert not encoded.exists("train")
    assert not encoded.exists("heldout")
    listed = [(row["key"], row["cause"]) for row in pq.read_table(f"{encoded.uri}/quarantine.parquet").to_pylist()]
    assert listed == [("00200", "image"), ("00201", "caption"), ("00202", "image")]
    causes = {"image": 2, "caption": 1}
    assert encode(allow(0.08)) == {"rows": 40, "held-out rows": 6, "bad rows": 3, "causes": causes}
    assert len(rows_of(allow(0.08))) == 40


def test_what_cannot_work_fails_before_anything_runs(config, tmp_path):
    def fails(message: str, **sections) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            encode(replace(config, root=str(tmp_path / "run"), **sections))
        assert "\n" not in str(caught.value)

    fails("nowhere: does not exist; .*change data.source", data=replace(config.data, source=str(tmp_path / "nowhere")))
    fails(r"no file matches 'x-\*'.*data.train", data=replace(config.data, train="x-*"))
    fails(r"no file matches 'x-\*'.*data.heldout", data=replace(config.data, heldout="x-*"))
    fails("holds no folder unet/", model=replace(config.model, pipeline=config.data.source))
    fails("nobody: is no folder", model=replace(config.model, prompt_encoder=str(tmp_path / "nobody")))
    fails("encode.actors: 9: with encode.cpus_per_actor 0.5 they need 4.5 CPU", encode=EncodeConfig(actors=9))
    (tmp_path / "bare").mkdir()
    pq.write_table(pa.table({"image": [image_bytes(0)], "words": ["a cat"]}), tmp_path / "bare" / "train-0.parquet")
    (tmp_path / "bare" / "test_0.tar").write_bytes(tar_of(sample(0)))
    bare = replace(config.data, source=str(tmp_path / "bare"))
    fails("data.train: train-0.parquet: has the columns image, words; one must be named captions or", data=bare)
    (tmp_path / "bare" / "train-0.parquet").unlink()
    (tmp_path / "bare" / "train-0.tar").write_bytes(tar_of(sample(0, captions=[]) + sample(1, captions=[" "])))
    fails("data.train: train-0.tar: none of its first 2 rows has a caption .first 00000: empty or missing", data=bare)
    unreachable = StorageConfig(endpoint="http://127.0.0.1:9", attempts=1)
    fails("not reachable at storage.endpoint", data=replace(config.data, source="s3://a/b"), storage=unreachable)
    assert not (tmp_path / "run").exists()
