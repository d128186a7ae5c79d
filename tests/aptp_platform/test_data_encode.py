"""Encoding is a function of the row alone, publishes all or nothing, and accounts for every bad row."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from captioned import IMAGE_SIZE, captions_of, image_bytes, sample, samples, tar_of, write_shards, write_text_encoder
from tiny_pipeline import build_pipeline

from aptp.latents import encode_images
from aptp.prompts import PromptEncoder
from aptp_platform.config import DataConfig, EncodeConfig, ModelConfig, RunConfig
from aptp_platform.data import encode as encoding
from aptp_platform.data.encode import encode
from aptp_platform.data.encoded import read_encoded
from aptp_platform.data.shards import decode_image
from aptp_platform.models import load_vae
from aptp_platform.storage import Store, StorageConfig

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder / "pipeline")
    prompts = write_text_encoder(folder / "prompts")
    return ModelConfig(pipeline=str(folder / "pipeline"), prompt_encoder=str(prompts))


@pytest.fixture
def config(model, tmp_path) -> RunConfig:
    write_shards(tmp_path / "data", train=30, heldout=6)
    return RunConfig(
        root=str(tmp_path / "run"),
        data=DataConfig(source=str(tmp_path / "data"), image_size=IMAGE_SIZE),
        model=model,
        encode=EncodeConfig(batch_size=4, actors=1, cpus_per_actor=0.25, rows_per_file=8),
    )


def rows_of(config: RunConfig, split: str = "train") -> list[dict]:
    store = Store.open(config.root, config.storage).join("encoded", split)
    return sorted(read_encoded(store).take_all(), key=lambda row: row["position"])


def test_rows_are_what_the_models_say_of_each_alone(config):
    assert encode(config) == {"rows": 30, "held-out rows": 6, "bad rows": 0, "causes": {}}
    vae = load_vae(config.model, config.storage)
    prompts = PromptEncoder.load(config.model.prompt_encoder)
    for row in [*rows_of(config), *rows_of(config, "heldout")]:
        index = int(row["key"])
        assert row["captions"] == captions_of(index)
        pixels = torch.from_numpy(decode_image(image_bytes(index), IMAGE_SIZE))[None].float() / 127.5 - 1
        np.testing.assert_allclose(row["latents"], encode_images(vae, pixels)[0].numpy(), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(row["embeddings"], prompts.encode(captions_of(index)).numpy(), rtol=2e-3, atol=1e-3)
        assert row["latents"].dtype == row["embeddings"].dtype == np.float16
    assert [int(row["key"]) for row in rows_of(config)] == [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]
    assert Store.open(config.root).join("encoded").list("*") == ["quarantine.parquet"]


def test_batches_actors_and_waves_change_nothing(config, tmp_path, monkeypatch):
    encode(config)
    other = replace(
        config,
        root=str(tmp_path / "other"),
        encode=EncodeConfig(batch_size=7, actors=2, cpus_per_actor=0.25, rows_per_file=5),
    )
    monkeypatch.setattr(encoding, "FILES_A_WAVE", 2)
    encode(other)
    for ours, theirs in zip(rows_of(config), rows_of(other), strict=True):
        assert (ours["key"], ours["position"], ours["captions"]) == (
            theirs["key"],
            theirs["position"],
            theirs["captions"],
        )
        np.testing.assert_allclose(ours["latents"], theirs["latents"], rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(ours["embeddings"], theirs["embeddings"], rtol=2e-3, atol=1e-3)


def test_a_bucket_in_and_a_bucket_out(config, s3_server, tmp_path):
    storage = StorageConfig(endpoint=s3_server.endpoint)
    uri = s3_server.bucket("encode")
    Store.open(uri, storage).publish(tmp_path / "data", "data")
    Store.open(uri, storage).publish(config.model.pipeline, "model")
    remote = replace(
        config,
        root=f"{uri}/run",
        storage=storage,
        data=replace(config.data, source=f"{uri}/data"),
        model=replace(config.model, pipeline=f"{uri}/model"),
    )
    assert encode(remote)["rows"] == 30
    encode(config)
    for ours, theirs in zip(rows_of(config), rows_of(remote), strict=True):
        assert ours["key"] == theirs["key"]
        np.testing.assert_allclose(ours["latents"], theirs["latents"], rtol=2e-3, atol=1e-4)
    assert not Store.open(uri, storage).join("run", "encoded").exists(".partial")


def test_bad_rows_are_skipped_counted_and_listed_up_to_the_share(config, tmp_path):
    members = samples(range(100, 120))
    members += sample(200, image=b"no image") + sample(201, captions=[" "]) + sample(202, image=image_bytes(202)[:70])
    (tmp_path / "data" / "train-03.tar").write_bytes(tar_of(members))
    with pytest.raises(ValueError, match=r"data.train: 3 of 53 rows are bad, data.max_bad_share allows 0.01: first 00200"):
        encode(config)
    encoded = Store.open(config.root).join("encoded")
    assert not encoded.exists("train")
    assert not encoded.exists("heldout")
    listed = pq.read_table(f"{encoded.uri}/quarantine.parquet").to_pylist()
    assert [(row["key"], row["cause"]) for row in listed] == [
        ("00200", "image"),
        ("00201", "caption"),
        ("00202", "image"),
    ]
    patient = replace(config, data=replace(config.data, max_bad_share=0.06))
    assert encode(patient) == {
        "rows": 50,
        "held-out rows": 6,
        "bad rows": 3,
        "causes": {"image": 2, "caption": 1},
    }
    assert len(rows_of(config)) == 50


def test_a_lost_file_counts_as_a_file(config, tmp_path):
    whole = (tmp_path / "data" / "train-01.tar.gz").read_bytes()
    (tmp_path / "data" / "train-01.tar.gz").write_bytes(b"not a tar at all")
    with pytest.raises(
        ValueError, match=r"1 of 3 files are bad, .*: first train-01.tar.gz: shard: ReadError: .*quarantine.parquet"
    ):
        encode(config)
    (tmp_path / "data" / "train-01.tar.gz").write_bytes(whole[: len(whole) // 2])
    fresh = replace(config, root=str(tmp_path / "fresh"), data=replace(config.data, max_bad_share=0.4))
    summary = encode(fresh)
    assert 20 < summary["rows"] < 30
    assert summary["causes"] == {"shard": 1}


def test_a_job_that_stopped_goes_on_behind_its_last_wave(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "FILES_A_WAVE", 1)
    waves: list[tuple[str, int]] = []
    encode_wave = encoding._encode_wave

    def stop_at_the_third(config, split, wave, target, progress):
        result = encode_wave(config, split, wave, target, progress)
        waves.append((split.name, wave.start))
        if len(waves) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(encoding, "_encode_wave", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode(config)
    assert not Store.open(config.root).exists("encoded/train")
    assert encode(config)["rows"] == 30
    assert waves == [("train", 0), ("train", 1), ("train", 2), ("train", 2), ("heldout", 0)]
    assert [int(row["key"]) for row in rows_of(config)] == [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]


def test_what_cannot_work_fails_before_anything_runs(config, tmp_path):
    def fails(message: str, **sections) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            encode(replace(config, **sections))
        assert "\n" not in str(caught.value)

    fails("nowhere: does not exist; .*change data.source", data=replace(config.data, source=str(tmp_path / "nowhere")))
    fails(r"no file matches 'x-\*'.*data.train", data=replace(config.data, train="x-*"))
    fails(r"no file matches 'x-\*'.*data.heldout", data=replace(config.data, heldout="x-*"))
    fails("holds no folder unet/", model=replace(config.model, pipeline=str(tmp_path / "data")))
    fails("nobody is no folder|is no folder", model=replace(config.model, prompt_encoder=str(tmp_path / "nobody")))
    unreachable = StorageConfig(endpoint="http://127.0.0.1:9")
    fails("not reachable at storage.endpoint", data=replace(config.data, source="s3://a/b"), storage=unreachable)
    assert not (tmp_path / "run").exists()


def test_an_error_on_a_worker_is_one_line_here(config, tmp_path):
    (tmp_path / "data" / "listed.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match=r"^listed.tsv: its header is \['a', 'b'\]; one column must be [^\n]*$"):
        encode(replace(config, data=replace(config.data, train="listed.tsv")))
