"""Extractors of image scores: a small CLIP made here, FID's network with random weights, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from aptp.metrics import clip_score, maximum_mean_discrepancy
from aptp_platform.config import ConfigError, EvaluateConfig, StorageConfig
from aptp_platform.config_file import parse_config, places
from aptp_platform.experts.evidence.features import (
    AVERAGING,
    FID_CLASSES,
    check_features,
    extractor_name,
    image_scores,
    load_extractor,
)
from tests.support.tiny_pipeline import NUM_TOKENS, build_tokenizer

CPU, LOCAL = torch.device("cpu"), StorageConfig()
CAPTIONS = ["a red cat", "a blue car that goes on and on and on and on and on and on"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), build_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **layers, "vocab_size": len(tokenizer), "max_position_embeddings": NUM_TOKENS,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**layers, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


@torch.no_grad()
def test_clip_features_are_those_of_the_model_and_give_cmmd_and_clip_score(clip: Path) -> None:
    spec = f"clip:{clip}"
    check_features(EvaluateConfig(features=spec), LOCAL)
    extractor = load_extractor(spec, LOCAL, CPU)
    assert extractor.texts is not None
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = CLIPModel.from_pretrained(clip).eval()
    expected = model.get_image_features(images).pooler_output  # of this size and scale: mean and deviation are 1/2
    ours = extractor.images(images)
    assert extractor.images(torch.zeros(1, 3, 50, 70)).shape == (1, 8)
    assert torch.allclose(ours, expected, atol=1e-4)
    texts = extractor.texts(CAPTIONS)
    short = build_tokenizer()(CAPTIONS[:1], return_tensors="pt")
    assert torch.allclose(texts[:1], model.get_text_features(**short).pooler_output, atol=1e-5), (
        "padding changes nothing"
    )
    real = extractor.images(images.flip(0) * 0.5)
    assert image_scores("clip", ours, real, texts) == {
        "cmmd": maximum_mean_discrepancy(ours, real),
        "clip_score": clip_score(ours, texts),
    }


def test_scores_have_their_names_only_with_their_networks() -> None:
    few, many = torch.randn(600, 4), torch.randn(2048, 4)
    assert set(image_scores("lite0", few, few, None)) == {"fd_lite0", "cmmd_lite0"}
    assert image_scores("lite0", few, few, None)["fd_lite0"] == pytest.approx(0, abs=1e-6)
    assert image_scores("lite0", few[:500], few, None)["fd_lite0"] is None
    assert image_scores("inception", few, many, None) == {"fid": None}
    assert image_scores("inception", many, many, None)["fid"] == pytest.approx(0, abs=1e-6)
    assert image_scores("lite0", few[:1], few, None) == {"fd_lite0": None, "cmmd_lite0": None}


def test_what_cannot_be_computed_is_refused_before_anything_is(tmp_path: Path, clip: Path) -> None:
    tree = {"data": {"source": "/data"}, "model": {"pipeline": "/model"}}
    with pytest.raises(ConfigError, match=r"^evaluate.features: 'fid'"):
        parse_config({**tree, "evaluate": {"features": "fid"}})
    config = parse_config({**tree, "evaluate": {"features": f"clip:{clip}"}})
    assert places(config)["evaluate.features"] == str(clip)
    assert extractor_name(config.evaluate.features) == "clip"
    assert "evaluate.features" not in places(parse_config(tree))
    for spec, line in (
        (f"clip:{tmp_path}", "holds no config.json"),
        (f"clip:{tmp_path / 'absent'}", "is no folder"),
        (f"inception:{tmp_path}", r"holds 0 files \*.safetensors|pip install \"aptp\[metrics\]\""),
    ):
        with pytest.raises(ConfigError, match=rf"^evaluate.features: .*({line})"):
            check_features(EvaluateConfig(features=spec), LOCAL)
    for file in clip.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(clip / "model.safetensors")
    gone = next(name for name in weights if name.startswith("vision_model."))
    kept = {name: tensor for name, tensor in weights.items() if name != gone}
    for given, line in (({}, "holds no weights"), (kept, f"its files lack {gone}, which a CLIPModel has")):
        if given:
            save_file(given, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=rf"^evaluate.features: {tmp_path}: {line}"):
            load_extractor(f"clip:{tmp_path}", LOCAL, CPU)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = pytest.importorskip("torchvision.models")
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    save_file(_inception(models, FID_CLASSES).state_dict(), folder / "fid.safetensors")
    return folder


def _inception(models: object, classes: int) -> torch.nn.Module:
    return models.inception_v3(weights=None, num_classes=classes, aux_logits=False, init_weights=False)  # type: ignore[attr-defined]


@torch.no_grad()
def test_fids_network_pools_as_the_reference_does(inception: Path) -> None:
    extractor = load_extractor(f"inception:{inception}", LOCAL, CPU)
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    assert extractor.images(images).shape == (2, 2048)
    network = extractor.images.network  # type: ignore[attr-defined]
    pooled: dict[str, torch.Tensor] = {}
    for name in (AVERAGING[0], "Mixed_7c"):
        block = getattr(network, name)
        block.register_forward_pre_hook(lambda _, args, at=name: pooled.update({f"{at} in": args[0]}))
        block.branch_pool.conv.register_forward_pre_hook(lambda _, args, at=name: pooled.update({at: args[0]}))
    extractor.images(images)
    average = F.avg_pool2d(pooled[f"{AVERAGING[0]} in"], 3, stride=1, padding=1, count_include_pad=False)
    assert torch.allclose(pooled[AVERAGING[0]], average, atol=1e-5)
    assert torch.equal(pooled["Mixed_7c"], F.max_pool2d(pooled["Mixed_7c in"], 3, stride=1, padding=1))


def test_other_weights_than_fids_are_refused(inception: Path, tmp_path: Path) -> None:
    check_features(EvaluateConfig(features=f"inception:{inception}", generated=2048), LOCAL)
    with pytest.raises(ConfigError, match=r"^evaluate.generated: 256: FID needs 2048 images"):
        check_features(EvaluateConfig(features=f"inception:{inception}"), LOCAL)
    models = pytest.importorskip("torchvision.models")
    save_file(_inception(models, 1000).state_dict(), tmp_path / "torchvision.safetensors")
    with pytest.raises(ConfigError, match="is not the network of FID"):
        load_extractor(f"inception:{tmp_path}", LOCAL, CPU)
