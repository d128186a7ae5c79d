"""The teacher's denoiser: a small UNet with Stable Diffusion 2.1's block types, v-prediction, over cached latents."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from aptp_platform.run.progress import Progress
from examples.emoji.training.workers import Workers, update_average


@dataclass(frozen=True)
class DenoiserConfig:
    """How the denoiser is shaped and trained.

    `images` counts what is seen over all workers. The rate is constant after the warm-up and falls linearly to zero
    over the last `decay_share` of the images, so a run can be extended at any time before that. `start` is the folder
    of a trained UNet to go on from, in place of an untrained one of these widths.
    """

    start: str | None = None
    channels: tuple[int, ...] = (32, 64, 128, 128)
    heads: tuple[int, ...] = (2, 4, 8, 8)
    images: int = 300_000
    batch_size: int = 16  # per worker
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_images: int = 6_400
    decay_share: float = 0.35
    average_decay: float = 0.999
    captionless_share: float = 0.1
    min_snr_gamma: float = 5.0
    checkpoint_seconds: float = 120.0
    seed: int = 0


@dataclass(frozen=True)
class CachedSet:
    """Latents of every image and text states of each of its captions, in memory or mapped from a file."""

    latents: Float[Tensor, "image 4 height width"]
    texts: Float[Tensor, "image caption token dim"]
    null_text: Float[Tensor, "token dim"]


def build_denoiser(config: DenoiserConfig, sample_size: int, text_dim: int) -> UNet2DConditionModel:
    """A UNet shaped as Stable Diffusion 2.1's at these widths, untrained, or the one to go on from."""
    if config.start is not None:
        return UNet2DConditionModel.from_pretrained(config.start).float()
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=config.channels,
        layers_per_block=2,
        attention_head_dim=config.heads,
        cross_attention_dim=text_dim,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 2.1's noise schedule and prediction type."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_denoiser(
    data: CachedSet,
    config: DenoiserConfig,
    workers: Workers,
    folder: Path,
    on_checkpoint: Callable[[UNet2DConditionModel, int], None],
) -> UNet2DConditionModel:
    """Train, or continue from the checkpoint in `folder`; returns the averaged weights.

    Args:
        folder: holds `model.safetensors`, `average.safetensors`, `optimizer.pt`, `state.json` and `losses.jsonl`; only
            the first worker writes.
        on_checkpoint: called on the first worker with the averaged weights and the images seen so far.
    """
    torch.manual_seed(config.seed)
    scheduler = build_scheduler()
    model = build_denoiser(config, data.latents.shape[-1], data.null_text.shape[-1])
    # In bf16 on a CPU the fused attention's backward takes longer than all else together; the plain one does not.
    model.set_attn_processor(AttnProcessor())
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    batch_size = config.batch_size * workers.count
    steps = config.images // batch_size
    start = _load(folder, model, average, optimizer) // batch_size
    progress = Progress("denoiser", steps) if workers.rank == 0 else None
    recent: list[float] = []
    started = saved = time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(step * batch_size, config)
        generator = torch.Generator().manual_seed((config.seed << 40) + step * workers.count + workers.rank)
        loss = _denoising_loss(model, scheduler, data, config, generator)
        loss.backward()
        workers.average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, min(config.average_decay, (1 + step) / (10 + step)))
        recent.append(loss.item())
        seen = (step + 1) * batch_size
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = workers.mean(sum(recent) / len(recent))
            rate = (step + 1 - start) * batch_size / (time.monotonic() - started)
            if progress is not None:
                progress.update(step + 1, **{"loss": mean, "images/s": rate})
                with (folder / "losses.jsonl").open("a") as log:
                    log.write(json.dumps({"images": seen, "loss": mean}) + "\n")
            recent.clear()
        if workers.rank == 0 and (time.monotonic() - saved > config.checkpoint_seconds or step + 1 == steps):
            seconds = time.monotonic() - saved
            _save(folder, model, average, optimizer, config, seen, seconds)
            on_checkpoint(average, seen)
            saved = time.monotonic()
    workers.wait()
    return average.eval()


def _rate(images: int, config: DenoiserConfig) -> float:
    left = (1 - images / config.images) / config.decay_share
    return min(1.0, (images + 1) / config.warmup_images, left)


def _denoising_loss(
    model: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    data: CachedSet,
    config: DenoiserConfig,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """v-prediction with min-SNR weights min(snr + 1, gamma) / (snr + 1) (arXiv 2303.09556, in its v form)."""
    rows = torch.randint(len(data.latents), (config.batch_size,), generator=generator)
    captions = torch.randint(data.texts.shape[1], (config.batch_size,), generator=generator)
    latents, texts = data.latents[rows].float(), data.texts[rows, captions].float()
    captionless = torch.rand(len(rows), generator=generator) < config.captionless_share
    texts = torch.where(captionless[:, None, None], data.null_text.float(), texts)
    noise = torch.randn(latents.shape, generator=generator)
    uniform = torch.rand(len(rows), generator=generator)
    timesteps = stratified_timesteps(uniform, scheduler.config.num_train_timesteps)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16):  # weights and moments stay in fp32
        predicted = model(noisy, timesteps, texts).sample
    error = (predicted.float() - target).square().mean((1, 2, 3))
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    return ((snr + 1).clamp(max=config.min_snr_gamma) / (snr + 1) * error).mean()


def stratified_timesteps(uniform: Float[Tensor, " batch"], num_timesteps: int) -> Int[Tensor, " batch"]:
    """One timestep in each of `batch` equal slices of 0..num_timesteps-1: uniform over batches, a steadier gradient.

    Args:
        uniform: where in its slice each one lies, in [0, 1).
    """
    places = (torch.arange(len(uniform)) + uniform) / len(uniform)
    return (places * num_timesteps).long().clamp(max=num_timesteps - 1)  # in fp32 the last place may round up to 1


def _save(
    folder: Path,
    model: UNet2DConditionModel,
    average: UNet2DConditionModel,
    optimizer: torch.optim.Optimizer,
    config: DenoiserConfig,
    images: int,
    seconds: float,
) -> None:
    state = read_state(folder)
    fresh = folder / "checkpoint.new"
    fresh.mkdir(exist_ok=True)
    save_file(model.state_dict(), fresh / "model.safetensors")
    save_file(average.state_dict(), fresh / "average.safetensors")
    torch.save(optimizer.state_dict(), fresh / "optimizer.pt")
    state = {"images": images, "seconds": state["seconds"] + seconds, "config": asdict(config)}
    (fresh / "state.json").write_text(json.dumps(state))
    old = folder / f"checkpoint-{images}"
    fresh.rename(old)
    for stale in folder.glob("checkpoint-*"):
        if stale != old:
            for path in stale.iterdir():
                path.unlink()
            stale.rmdir()


def _latest(folder: Path) -> Path | None:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def read_state(folder: Path) -> dict[str, Any]:
    """Images seen, seconds taken and the config of the latest checkpoint."""
    latest = _latest(folder)
    return json.loads((latest / "state.json").read_text()) if latest else {"images": 0, "seconds": 0.0}


def _load(
    folder: Path,
    model: UNet2DConditionModel,
    average: UNet2DConditionModel,
    optimizer: torch.optim.Optimizer,
) -> int:
    latest = _latest(folder)
    if latest is None:
        return 0
    model.load_state_dict(load_file(latest / "model.safetensors"))
    average.load_state_dict(load_file(latest / "average.safetensors"))
    optimizer.load_state_dict(torch.load(latest / "optimizer.pt", weights_only=True))
    return int(read_state(folder)["images"])
