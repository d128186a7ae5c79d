"""Images that networks generate and images that are real, as features and as small pictures."""

import io
from typing import Final

import numpy as np
import pyarrow.compute as pc
import ray
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from aptp_platform.config import RunConfig
from aptp_platform.data.captions import decode_rows, read_captioned, source_files
from aptp_platform.data.heldout import HeldOut, batches_of, row_generator
from aptp_platform.experts.evidence.features import CLIP, extractor_name, load_extractor

PICTURE_SIZE: Final = 192  # pixels at most, of the reports' pictures
IMAGES_PER_TASK: Final = 512  # real images whose features one task computes
TASKS_AT_ONCE: Final = 8  # their images wait in the object store


@torch.no_grad()
def generate(
    config: RunConfig, pipeline: StableDiffusionPipeline, held: HeldOut, rows: list[int]
) -> tuple[dict[int, Float[np.ndarray, " feature"]], dict[int, bytes]]:
    """By row: features of one image, seeded by the row's key, and the image as a small PNG."""
    features: dict[int, Float[np.ndarray, " feature"]] = {}
    pictures: dict[int, bytes] = {}
    if not rows:
        return features, pictures
    pipeline.set_progress_bar_config(disable=True)
    extractor = load_extractor(config.evaluate.features, config.storage, pipeline.device)
    for batch in batches_of(rows, config.evaluate.batch_size):
        images = pipeline(
            [held.captions[row] for row in batch],
            height=config.data.image_size,
            width=config.data.image_size,
            num_inference_steps=config.evaluate.inference_steps,
            guidance_scale=config.evaluate.guidance_scale,
            generator=[row_generator(held.keys[row]) for row in batch],
            output_type="pt",
        ).images
        if not images.isfinite().all():
            raise ValueError(
                f"evaluate: an image of rows {batch[0]}..{batch[-1]} holds numbers that are not finite: try less "
                "evaluate.guidance_scale, or another scheduler in the model's folder"
            )
        found = extractor.images(images * 2 - 1).cpu().numpy()
        for row, image, feature in zip(batch, images, found, strict=True):
            features[row] = feature
            pictures[row] = _png(image)
    return features, pictures


def _png(image: Float[Tensor, "3 height width"]) -> bytes:
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def real_features(config: RunConfig) -> Float[np.ndarray, "real feature"]:
    """Features of the held-out images as they are stored, cropped as for training."""
    files = [file for file in source_files(config.data, config.storage) if file.split == "heldout"]
    rows = read_captioned(config.data, config.storage, files).limit(4 * config.evaluate.images)
    task = _image_features.options(**resources(config))
    pending: list[ray.ObjectRef[np.ndarray]] = []
    for batch in rows.iter_batches(batch_size=IMAGES_PER_TASK, batch_format="pyarrow"):
        decoded = decode_rows(config.data.image_size, batch)
        good = decoded.filter(pc.equal(decoded["fault"], ""))
        if len(good):
            if len(pending) >= TASKS_AT_ONCE:
                ray.wait(pending, num_returns=len(pending) - TASKS_AT_ONCE + 1)
            pending.append(task.remote(config, good["image"].combine_chunks().to_numpy_ndarray()))
    return np.concatenate(ray.get(pending))


def text_features(config: RunConfig, captions: list[str]) -> Float[np.ndarray, "caption feature"] | None:
    """Features of captions; None if the extractor reads none."""
    if extractor_name(config.evaluate.features) != CLIP or not captions:
        return None
    return ray.get(_text_features.options(**resources(config)).remote(config, captions))


def resources(config: RunConfig) -> dict[str, float]:
    """What a task that computes with one network asks for."""
    return {"num_cpus": config.evaluate.cpus_per_network, "num_gpus": config.evaluate.gpus_per_network}


def device_of(config: RunConfig) -> torch.device:
    """Where such a task computes."""
    return torch.device("cuda" if config.evaluate.gpus_per_network else "cpu")


@ray.remote
def _image_features(
    config: RunConfig, images: UInt8[np.ndarray, "image 3 height width"]
) -> Float[np.ndarray, "image feature"]:
    device = device_of(config)
    extractor = load_extractor(config.evaluate.features, config.storage, device)
    batches = torch.tensor(images).split(config.evaluate.batch_size)
    found = [extractor.images(batch.to(device).float() / 127.5 - 1).cpu() for batch in batches]
    return torch.cat(found).numpy()


@ray.remote
def _text_features(config: RunConfig, captions: list[str]) -> Float[np.ndarray, "caption feature"]:
    extractor = load_extractor(config.evaluate.features, config.storage, device_of(config))
    assert extractor.texts is not None
    batches = batches_of(captions, config.evaluate.batch_size)
    return torch.cat([extractor.texts(batch).cpu() for batch in batches]).numpy()
