"""What the experts are worth: teacher, baselines and experts on the same held-out prompts, noise and seeds.

Two measures. The paired denoising loss differs between two networks by nothing but the networks. CMMD-lite0 compares
generated with real images (`aptp.metrics` says why it is not called CMMD). Each network is scored by one Ray task.
"""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from PIL import Image
from scipy.stats import bootstrap, spearmanr
from torch import Tensor

from aptp.expert import load_expert, read_expert_info
from aptp.metrics import Lite0, maximum_mean_discrepancy
from aptp_platform.config import RunConfig
from aptp_platform.data.captions import decode_rows, read_captioned, source_files
from aptp_platform.experts.report import write_report
from aptp_platform.experts.score import HeldOut, batches_of, check_scoring, read_held_out, row_generator, row_losses
from aptp_platform.models import load_pipeline_parts
from aptp_platform.run.layout import FINETUNED, HELD_OUT_ROWS, network_of, refitted_router
from aptp_platform.run.progress import Progress
from aptp_platform.storage.store import Store

TEACHER = "teacher"


@dataclass(frozen=True)
class ArmShare:
    """The share of an arm that one network answers for: its rows."""

    arm: str
    network: str | None  # a folder under the run's root; None: the teacher
    ratio: float
    rows: list[int]


@dataclass(frozen=True)
class Scores:
    """What one share measured: a loss per row, and features and small pictures of the rows it generated."""

    losses: Float[np.ndarray, " row"]
    features: Float[np.ndarray, "generated dim"]
    thumbnails: list[bytes]


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Score every arm on the held-out rows and publish `evaluated/` (metrics.json, figures, report.html).

    Raises:
        ConfigError: a network's task is larger than the cluster, or there is no held-out row.
    """
    check_scoring(config.evaluate)
    root = Store.open(config.root, config.storage)
    held = read_held_out(config, root.join(HELD_OUT_ROWS), config.evaluate.images)
    router = refitted_router(root)
    codes = router.route_embeddings(held.embeddings).indices.tolist()
    shares = list(_arm_shares(config, root, codes, router.num_codes))
    scored = _score_all(config, held, shares)
    real = _real_features(config)
    arms: dict[str, Any] = {}
    losses: dict[str, np.ndarray] = {}
    for arm in dict.fromkeys(share.arm for share in shares):
        mine = [(share, scores) for share, scores in zip(shares, scored, strict=True) if share.arm == arm]
        losses[arm], ratios = np.empty(len(codes)), np.empty(len(codes))
        for share, scores in mine:
            losses[arm][share.rows], ratios[share.rows] = scores.losses, share.ratio
        features = np.concatenate([scores.features for _, scores in mine])
        arms[arm] = {
            "macs_ratio": float(ratios.mean()),
            "denoising_loss": float(losses[arm].mean()),
            "cmmd_lite0": maximum_mean_discrepancy(torch.from_numpy(features), real),
        }
    for arm, facts in arms.items():
        if arm != TEACHER:
            extra = losses[arm] - losses[TEACHER]
            facts["extra_loss"] = float(extra.mean())
            facts["extra_loss_95"] = _interval(extra)
    expert_ratios = [share.ratio for share in shares if share.arm == "experts"]
    metrics = {
        "held_out": len(codes),
        "generated": min(len(codes), config.evaluate.generated),
        "arms": arms,
        "codes": _code_facts(shares, codes),
        "kinds": _kind_facts(held.kinds, codes, expert_ratios, losses),
        "experts_minus_baselines": {
            arm: {
                "mean": float((losses["experts"] - losses[arm]).mean()),
                "95": _interval(losses["experts"] - losses[arm]),
            }
            for arm in arms
            if arm not in (TEACHER, "experts")
        },
    }
    thumbnails = {
        arm: _in_order(
            config, [(share, scores) for share, scores in zip(shares, scored, strict=True) if share.arm == arm]
        )
        for arm in arms
    }
    write_report(root, metrics, held.captions, thumbnails)
    experts = arms["experts"]
    return {
        "held-out rows": len(codes),
        **{f"loss of {arm}": round(facts["denoising_loss"], 4) for arm, facts in arms.items()},
        "experts' MACs ratio": round(experts["macs_ratio"], 3),
    }


def _arm_shares(config: RunConfig, root: Store, codes: list[int], num_codes: int) -> Iterator[ArmShare]:
    everything = list(range(len(codes)))
    yield ArmShare(TEACHER, None, 1.0, everything)
    for name in config.cut.baselines:
        folder = f"{FINETUNED}/{name}"
        yield ArmShare(name, folder, _ratio(root, folder), everything)
    for code in range(num_codes):
        rows = [row for row in everything if codes[row] == code]
        if rows:  # a code may have no held-out prompt
            folder = f"{FINETUNED}/{network_of(code)}"
            yield ArmShare("experts", folder, _ratio(root, folder), rows)


def _ratio(root: Store, folder: str) -> float:
    """The MACs ratio that an expert's own folder states."""
    with tempfile.TemporaryDirectory() as scratch:
        return read_expert_info(root.fetch(folder, scratch)).cost.ratio


def _score_all(config: RunConfig, held: HeldOut, shares: list[ArmShare]) -> list[Scores]:
    shared, settings = ray.put(held), ray.put(config)
    task = _score.options(num_cpus=config.evaluate.cpus_per_network, num_gpus=config.evaluate.gpus_per_network)
    # The one with most rows first, so that no long one is left for last.
    order = sorted(range(len(shares)), key=lambda index: -len(shares[index].rows))
    pending = {task.remote(settings, shared, shares[index]): index for index in order}
    scored: dict[int, Scores] = {}
    with Progress("evaluate", len(shares)) as progress:
        progress.update(0)
        while pending:
            (ready,), _ = ray.wait(list(pending))
            index = pending.pop(ready)
            scored[index] = ray.get(ready)
            progress.update(len(scored), network=shares[index].network or TEACHER)
    return [scored[index] for index in range(len(shares))]


@ray.remote
def _score(config: RunConfig, held: HeldOut, share: ArmShare) -> Scores:
    parts = load_pipeline_parts(config.model, config.storage)
    unet = parts.unet
    if share.network is not None:
        with tempfile.TemporaryDirectory() as scratch:
            unet = load_expert(Store.open(config.root, config.storage).fetch(share.network, scratch))
    device = torch.device("cuda" if config.evaluate.gpus_per_network else "cpu")
    pipeline = parts.pipeline(unet.eval()).to(device)
    pipeline.set_progress_bar_config(disable=True)
    generated = [row for row in share.rows if row < config.evaluate.generated]
    features, thumbnails = _generate(config, pipeline, held, generated)
    return Scores(row_losses(config.evaluate, parts, unet, held, share.rows), features, thumbnails)


@torch.no_grad()
def _generate(
    config: RunConfig, pipeline: StableDiffusionPipeline, held: HeldOut, rows: list[int]
) -> tuple[Float[np.ndarray, "generated dim"], list[bytes]]:
    """Features of one image a row, seeded by the row's key, and each image as a small PNG."""
    extractor = Lite0().to(pipeline.device)
    features, thumbnails = [np.zeros((0, extractor.dim), np.float32)], []
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
        features.append(extractor(images * 2 - 1).cpu().numpy())
        for image in images:
            pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.LANCZOS).save(buffer, "PNG")
            thumbnails.append(buffer.getvalue())
    return np.concatenate(features), thumbnails


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


def _in_order(config: RunConfig, mine: list[tuple[ArmShare, Scores]]) -> list[bytes]:
    """Thumbnails of the generated rows, in the rows' order whichever share made them."""
    found: dict[int, bytes] = {}
    for share, scores in mine:
        rows = [row for row in share.rows if row < config.evaluate.generated]
        found.update(zip(rows, scores.thumbnails, strict=True))
    return [found[row] for row in sorted(found)]


def _code_facts(shares: list[ArmShare], codes: list[int]) -> list[dict[str, Any]]:
    experts = [share for share in shares if share.arm == "experts"]
    return [
        {"code": codes[share.rows[0]], "macs_ratio": share.ratio, "share": len(share.rows) / len(codes)}
        for share in experts
    ]


def _kind_facts(
    kinds: list[str], codes: list[int], ratios: list[float], losses: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Who gets capacity: by kind of prompt, the routed ratio beside what a smaller network costs that kind.

    The router never sees the kind. The rank correlation is over kinds with at least 8 rows.
    """
    baseline = next((arm for arm in losses if arm not in (TEACHER, "experts")), None)
    by_code = dict(zip(sorted(set(codes)), ratios, strict=True))
    routed = np.array([by_code[code] for code in codes])
    table: dict[str, Any] = {}
    for kind in sorted(set(kinds)):
        mine = np.array([each == kind for each in kinds])
        if mine.sum() >= 8:
            table[kind] = {"rows": int(mine.sum()), "routed_ratio": float(routed[mine].mean())}
            if baseline is not None:
                table[kind]["baseline_extra_loss"] = float((losses[baseline] - losses[TEACHER])[mine].mean())
    correlation = None
    if baseline is not None and len(table) > 2 and len({facts["routed_ratio"] for facts in table.values()}) > 1:
        columns = ([facts[name] for facts in table.values()] for name in ("routed_ratio", "baseline_extra_loss"))
        correlation = float(spearmanr(*columns).statistic)
    return {"table": table, "rank_correlation": correlation}


def _interval(values: Float[np.ndarray, " row"]) -> tuple[float, float]:
    """A bootstrap 95 % interval of the mean."""
    if len(values) < 2:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)
