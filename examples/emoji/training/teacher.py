"""From shards to a stock diffusers folder: the autoencoder, the cache, the denoiser, the model card."""

import copy
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import UInt8
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from aptp_platform.data.formats.tar import read_shard
from aptp_platform.data.sample import Fault, decode_image
from aptp_platform.run.progress import Progress
from examples.emoji.training.autoencoder import AutoencoderConfig, encode_means, train_autoencoder
from examples.emoji.training.card import write_card
from examples.emoji.training.denoiser import CachedSet, DenoiserConfig, build_scheduler, train_denoiser
from examples.emoji.training.workers import Workers


@dataclass(frozen=True)
class TeacherConfig:
    """A whole teacher: where it reads, where it works, how its two parts are trained."""

    shards: Path
    text_encoder: Path
    work: Path
    image_size: int = 64
    num_text_tokens: int = 32
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)


def train_teacher(config: TeacherConfig, workers: Workers) -> None:
    """Run every step that is not done yet. The pipeline folder `config.work / "pipeline"` exists from the first
    checkpoint on and is renewed at each."""
    config.work.mkdir(parents=True, exist_ok=True)
    images, captions = read_images(config.shards, config.image_size)
    if not (config.work / "vae").exists():
        trained = train_autoencoder(images, config.autoencoder, workers)
        if workers.rank == 0:
            trained.save_pretrained(config.work / "vae.new")
            (config.work / "vae.new").rename(config.work / "vae")
        workers.wait()
    vae = AutoencoderKL.from_pretrained(config.work / "vae").eval()
    latents, texts = config.work / "latents.safetensors", config.work / "texts.safetensors"
    if workers.rank == 0 and not latents.exists():
        _save(latents, {"latents": encode_means(vae, images)})
    if workers.rank == workers.count - 1 and not texts.exists():
        _save(texts, _encode_captions(config, captions))
    workers.wait()
    data = CachedSet(**load_file(latents), **load_file(texts))
    train_denoiser(data, config.denoiser, workers, config.work, lambda unet, _: write_pipeline(config, vae, unet))
    if workers.rank == 0:
        firsts = [each[0] for each in captions]
        write_card(
            config.work / "pipeline", config.work, config.text_encoder, config.num_text_tokens, workers.count, firsts
        )


def read_images(shards: Path, size: int) -> tuple[UInt8[np.ndarray, "image 3 height width"], list[tuple[str, ...]]]:
    """Every image of the training shards, and its captions: for each as many as the image with the fewest has."""
    images, captions = [], []
    for path in sorted(shards.glob("train-*.tar*")):
        with path.open("rb") as stream:
            for row in read_shard(stream, path.name):
                if isinstance(row, Fault):
                    raise ValueError(f"{path.name}: {row.key}: {row.cause}: {row.detail}")
                images.append(decode_image(row.image, size))
                captions.append(row.captions)
    if not images:
        raise ValueError(f"shards: {shards} holds no train-*.tar or train-*.tar.gz; build them or name another folder")
    fewest = min(map(len, captions))
    return np.stack(images), [each[:fewest] for each in captions]


@torch.no_grad()
def _encode_captions(config: TeacherConfig, captions: list[tuple[str, ...]]) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(config.text_encoder)
    encoder = AutoModel.from_pretrained(config.text_encoder).eval()

    def encode(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=config.num_text_tokens, return_tensors="pt"
        )
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.half()

    texts = [text for each in captions for text in each]
    states = []
    with Progress("captions", len(texts)) as progress:
        for start in range(0, len(texts), 128):
            states.append(encode(texts[start : start + 128]))
            progress.update(start + len(states[-1]))
    grouped = torch.cat(states).reshape(len(captions), -1, *states[0].shape[1:])
    return {"texts": grouped, "null_text": encode([""])[0]}


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    scratch = path.with_suffix(".new")
    save_file(tensors, scratch)
    scratch.rename(path)


def write_pipeline(config: TeacherConfig, vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """The stock diffusers folder, in half precision, without the text encoder: its package brings it.

    `model_index.json` names the text encoder's classes, so `StableDiffusionPipeline.from_pretrained(folder,
    text_encoder=..., tokenizer=...)` completes it.
    """
    target = config.work / "pipeline"
    with tempfile.TemporaryDirectory(dir=config.work) as scratch:
        fresh = Path(scratch) / "pipeline"
        _half(unet).save_pretrained(fresh / "unet")
        _half(vae).save_pretrained(fresh / "vae")
        build_scheduler().save_pretrained(fresh / "scheduler")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "BertModel"],
            "tokenizer": ["transformers", "BertTokenizerFast"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (fresh / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def _half(module: Any) -> Any:
    return copy.deepcopy(module).half()
