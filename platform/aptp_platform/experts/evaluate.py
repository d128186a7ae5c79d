"""What the experts are worth: several arms on the same held-out prompts, noise and seeds.

In the paired denoising loss two networks see the same rows, noise and timesteps. CMMD-lite0 and FD-lite0 compare
generated with real images (`aptp.metrics` says why they are not called CMMD and FID). Each network is scored by one Ray
task. Prompts are routed at the price at which they cost the budget, so that all arms cost the same.
"""

import io
import tempfile
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc
import ray
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from aptp.calibration import set_price
from aptp.expert import load_expert, read_expert_info
from aptp.metrics import FeatureStatistics, Lite0, frechet_distance, maximum_mean_discrepancy
from aptp_platform.config import RunConfig
from aptp_platform.data.captions import decode_rows, read_captioned, source_files
from aptp_platform.data.heldout import HeldOut, batches_of, read_held_out, row_generator, row_losses
from aptp_platform.experts.arms import (
    ROUTED,
    TEACHER,
    arm_facts,
    build_arms,
    kind_facts,
    need_capacity,
    routed_minus,
)
from aptp_platform.experts.report import Evaluation, write_report
from aptp_platform.experts.score import check_scoring
from aptp_platform.models import load_pipeline_parts
from aptp_platform.run.layout import FINETUNED, home, network_of, refitted_router
from aptp_platform.run.progress import Progress
from aptp_platform.storage.store import Store

ENOUGH_FOR_FD: Final = 512  # images: below, the number of images dominates the distance
PICTURE_SIZE: Final = 128  # pixels at most, of the report's pictures


@dataclass(frozen=True)
class Task:
    """One network: at how many noises it is scored, and for which rows it generates images."""

    network: str | None  # a folder under the run's root; None: the teacher
    noises: int
    drawn: list[int]


@dataclass(frozen=True)
class Scores:
    """What one network measured: losses, and features and small images of the rows that it generated."""

    losses: Float[np.ndarray, "noise row"]
    features: dict[int, Float[np.ndarray, " dim"]]
    pictures: dict[int, bytes]


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Score every arm on the held-out rows and publish `evaluated/` (metrics.json, figures, report.html).

    Raises:
        ConfigError: a network's task is larger than the cluster, or there is no held-out row.
    """
    check_scoring(config.evaluate)
    root = Store.open(config.root, config.storage)
    held = read_held_out(config, config.evaluate.images)
    router = refitted_router(config)
    tuned = home(config, "finetune")
    if router.need is not None:
        set_price(router, held.embeddings, config.router.budget, tolerance=inf, balance=config.refit.balance)
    routes = router.route_embeddings(held.embeddings)
    codes = routes.indices.numpy()
    drawn = list(range(min(len(codes), config.evaluate.generated)))
    singles = {name: f"{FINETUNED}/{name}" for name in config.cut.baselines}
    tasks = {
        TEACHER: Task(None, 1, drawn),
        **{name: Task(folder, 1, drawn) for name, folder in singles.items()},
        **{
            network_of(code): Task(f"{FINETUNED}/{network_of(code)}", 2, [row for row in drawn if codes[row] == code])
            for code in range(router.num_codes)
        },
    }
    scored = _score_all(config, held, tasks)
    experts = np.stack([scored[network_of(code)].losses for code in range(router.num_codes)])
    costs = np.array([_cost(tuned, f"{FINETUNED}/{network_of(code)}") for code in range(router.num_codes)])
    teacher = scored[TEACHER].losses[0]
    others = {name: (scored[name].losses[0], _cost(tuned, folder)) for name, folder in singles.items()}
    arms = build_arms(teacher, experts, codes, costs, others)
    features, pictures = _by_arm(scored, codes, drawn, list(singles))
    facts, real = arm_facts(arms), _real_features(config)
    for name, mine in features.items():
        facts[name] |= _image_scores(torch.from_numpy(mine), real)
    predicted = None if routes.losses is None else routes.losses.numpy()
    need = experts[:, 0].mean(0) - teacher
    metrics = {
        "held_out": len(codes),
        "generated": len(drawn),
        "budget": config.router.budget,
        "price": None if router.need is None else float(router.price),
        "arms": facts,
        "routed_minus": routed_minus(arms),
        "need_capacity": need_capacity(teacher, experts, arms[ROUTED].costs, predicted),
        "codes": _code_facts(codes, costs),
        "kinds": kind_facts(held.kinds, need, arms[ROUTED].costs),
    }
    lost = arms[ROUTED].losses - teacher
    architectures = router.architecture_codes()
    write_report(
        root, Evaluation(metrics, held.captions, held.kinds, codes, costs, need, lost, pictures, architectures)
    )
    return {
        "held-out rows": len(codes),
        **{f"extra loss of {name}": round(facts[name]["extra_loss"], 4) for name in arms if name != TEACHER},
        "experts' MACs ratio": round(facts[ROUTED]["cost_ratio"], 3),
    }


def _cost(root: Store, folder: str) -> float:
    """The MACs ratio that a network's own folder states."""
    with tempfile.TemporaryDirectory() as scratch:
        return read_expert_info(root.fetch(folder, scratch)).cost.ratio


def _by_arm(
    scored: dict[str, Scores], codes: np.ndarray, drawn: list[int], singles: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, list[bytes]]]:
    """Features and pictures of the drawn rows, in their order, of every arm that draws."""
    sources = {name: [scored[name]] * len(drawn) for name in (TEACHER, *singles)}
    sources[ROUTED] = [scored[network_of(int(codes[row]))] for row in drawn]
    features = {
        name: np.stack([source.features[row] for row, source in zip(drawn, mine, strict=True)])
        for name, mine in sources.items()
        if drawn
    }
    pictures = {
        name: [source.pictures[row] for row, source in zip(drawn, mine, strict=True)] for name, mine in sources.items()
    }
    return features, pictures


def _image_scores(ours: Float[Tensor, "ours dim"], real: Float[Tensor, "real dim"]) -> dict[str, float | None]:
    """CMMD-lite0 and FD-lite0 to the real images; None where there are too few images."""
    enough = min(len(ours), len(real))
    scores: dict[str, float | None] = {"cmmd_lite0": None, "fd_lite0": None}
    if enough >= 2:
        scores["cmmd_lite0"] = maximum_mean_discrepancy(ours, real)
    if enough >= ENOUGH_FOR_FD:
        statistics = [FeatureStatistics(rows.shape[1]).update(rows) for rows in (ours, real)]
        scores["fd_lite0"] = frechet_distance(*statistics)
    return scores


def _score_all(config: RunConfig, held: HeldOut, tasks: dict[str, Task]) -> dict[str, Scores]:
    shared, settings = ray.put(held), ray.put(config)
    task = _score.options(num_cpus=config.evaluate.cpus_per_network, num_gpus=config.evaluate.gpus_per_network)
    # The longest first, so that no long task starts last.
    order = sorted(tasks, key=lambda name: -len(tasks[name].drawn))
    pending = {task.remote(settings, shared, tasks[name]): name for name in order}
    scored: dict[str, Scores] = {}
    with Progress("evaluate", len(tasks)) as progress:
        progress.update(0)
        while pending:
            (ready,), _ = ray.wait(list(pending))
            name = pending.pop(ready)
            scored[name] = ray.get(ready)
            progress.update(len(scored), network=name)
    return scored


@ray.remote
def _score(config: RunConfig, held: HeldOut, task: Task) -> Scores:
    parts = load_pipeline_parts(config.model, config.storage)
    unet = parts.unet
    if task.network is not None:
        with tempfile.TemporaryDirectory() as scratch:
            unet = load_expert(home(config, "finetune").fetch(task.network, scratch))
    device = torch.device("cuda" if config.evaluate.gpus_per_network else "cpu")
    pipeline = parts.pipeline(unet.eval()).to(device)
    pipeline.set_progress_bar_config(disable=True)
    features, pictures = _generate(config, pipeline, held, task.drawn)
    rows = list(range(len(held.keys)))
    losses = [row_losses(config.evaluate, parts, unet, held, rows, noise) for noise in range(task.noises)]
    return Scores(np.stack(losses), features, pictures)


@torch.no_grad()
def _generate(
    config: RunConfig, pipeline: StableDiffusionPipeline, held: HeldOut, rows: list[int]
) -> tuple[dict[int, Float[np.ndarray, " dim"]], dict[int, bytes]]:
    """By row: features of one image, seeded by the row's key, and the image as a PNG."""
    extractor = Lite0().to(pipeline.device)
    features, pictures = {}, {}
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
        found = extractor(images * 2 - 1).cpu().numpy()
        for row, image, feature in zip(batch, images, found, strict=True):
            features[row] = feature
            pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            buffer = io.BytesIO()
            picture = Image.fromarray(pixels)
            picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
            picture.save(buffer, "PNG")
            pictures[row] = buffer.getvalue()
    return features, pictures


def _real_features(config: RunConfig) -> Float[Tensor, "real dim"]:
    """Features of the held-out images as they are stored, cropped as for training."""
    files = [file for file in source_files(config.data, config.storage) if file.split == "heldout"]
    rows = read_captioned(config.data, config.storage, files).limit(4 * config.evaluate.images)
    extractor, features = Lite0(), []
    for batch in rows.iter_batches(batch_size=config.evaluate.batch_size, batch_format="pyarrow"):
        decoded = decode_rows(config.data.image_size, batch)
        good = decoded.filter(pc.equal(decoded["fault"], ""))
        if len(good):
            pixels = torch.tensor(good["image"].combine_chunks().to_numpy_ndarray())
            features.append(extractor(pixels.float() / 127.5 - 1))
    return torch.cat(features)


def _code_facts(codes: np.ndarray, costs: np.ndarray) -> list[dict[str, Any]]:
    shares = np.bincount(codes, minlength=len(costs)) / len(codes)
    return [
        {"code": code, "cost_ratio": float(cost), "share": float(share)}
        for code, (cost, share) in enumerate(zip(costs, shares, strict=True))
    ]
