"""What the experts are worth: several arms on the same held-out prompts, noise and seeds.

In the paired denoising loss two networks see the same rows, noise and timesteps; beside it stands the distance of their
predictions. Image scores compare generated with real images (`features`). Each network is scored by one Ray task; the
teacher's predictions are computed once and handed to the others. Prompts are routed at the price at which they cost the
budget, so that all arms cost the same.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float
from torch import Tensor, nn

from aptp.calibration import set_price
from aptp.expert import load_expert, read_expert_info
from aptp_platform.config import RunConfig
from aptp_platform.data.heldout import HeldOut, RowScores, read_held_out, score_rows
from aptp_platform.experts.evidence.arms import (
    ROUTED,
    TEACHER,
    Network,
    arm_facts,
    kind_facts,
    need_capacity,
    need_of,
    routed_minus,
)
from aptp_platform.experts.evidence.features import check_features, extractor_name, image_scores
from aptp_platform.experts.evidence.images import device_of, generate, real_features, resources, text_features
from aptp_platform.experts.evidence.report import write_report
from aptp_platform.experts.evidence.scores import RunScores
from aptp_platform.experts.score import check_scoring, forward_milliseconds
from aptp_platform.models import PipelineParts, load_pipeline_parts
from aptp_platform.run.layout import FINETUNED, home, network_of, refitted_router, trained_steps
from aptp_platform.run.progress import Progress
from aptp_platform.storage.store import Store


@dataclass(frozen=True)
class Task:
    """One network: at how many noises it is scored, and for which rows it generates images."""

    network: str | None  # a folder under the run's root; None: the teacher
    noises: int
    drawn: list[int]


@dataclass(frozen=True)
class Measured:
    """What the task of one network found: scores by noise; features and small images of the rows that it generated."""

    scores: list[RowScores]
    features: dict[int, Float[np.ndarray, " feature"]]
    pictures: dict[int, bytes]


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Score every arm on the held-out rows; publish `evaluated/`: metrics.json, scores, figures, report.html.

    Raises:
        ConfigError: a network's task is larger than the cluster, there is no held-out row, or `evaluate.features` names
            what is not there.
    """
    check_scoring(config.evaluate)
    check_features(config.evaluate, config.storage)
    root = Store.open(config.root, config.storage)
    held = read_held_out(config, config.evaluate.images)
    router = refitted_router(config)
    if router.need is not None:
        set_price(router, held.embeddings, config.router.budget, tolerance=inf, balance=config.refit.balance)
    routes = router.route_embeddings(held.embeddings)
    codes = routes.indices.numpy()
    drawn = list(range(min(len(codes), config.evaluate.generated)))
    tasks = {
        TEACHER: Task(None, 0, drawn),  # its losses come with its predictions
        **{name: Task(f"{FINETUNED}/{name}", 1, drawn) for name in config.cut.baselines},
        **{
            network_of(code): Task(f"{FINETUNED}/{network_of(code)}", 2, [row for row in drawn if codes[row] == code])
            for code in range(router.num_codes)
        },
    }
    measured = _measure_all(config, held, tasks)
    features, pictures = _by_arm(measured, codes, drawn, config.cut.baselines)
    scores = RunScores(
        budget=config.router.budget,
        seed=config.seed,
        steps_shared=config.share.run.steps,
        keys=held.keys,
        captions=held.captions,
        kinds=held.kinds,
        embeddings=held.embeddings.numpy(),
        codes=codes,
        predicted=None if routes.losses is None else routes.losses.numpy(),
        networks=_networks(config, held, tasks, measured),
        device=device_of(config).type,
        batch_size=config.evaluate.batch_size,
        timesteps=list(config.evaluate.timesteps),
        extractor=extractor_name(config.evaluate.features),
        features=features,
        real=real_features(config) if drawn else None,
        texts=text_features(config, [held.captions[row] for row in drawn]),
        pictures=pictures,
        architectures=router.architecture_codes(),
    )
    scores = replace(scores, image_scores=_image_scores(scores))
    metrics = _metrics(scores, None if router.need is None else float(router.price))
    write_report(root, metrics, scores)
    arms = metrics["arms"]
    return {
        "held-out rows": len(codes),
        **{f"extra loss of {name}": round(arms[name]["extra_loss"], 4) for name in arms if name != TEACHER},
        "experts' MACs ratio": round(arms[ROUTED]["cost_ratio"], 3),
    }


def _metrics(scores: RunScores, price: float | None) -> dict[str, Any]:
    arms = scores.arms()
    facts = arm_facts(arms)
    for name, found in scores.image_scores.items():
        facts[name] |= found
    teacher, experts = scores.teacher, scores.experts
    shares = np.bincount(scores.codes, minlength=len(experts)) / len(scores.codes)
    return {
        "held_out": len(scores.keys),
        "generated": len(next(iter(scores.features.values()), ())),
        "budget": scores.budget,
        "price": price,
        "arms": facts,
        "routed_minus": routed_minus(arms),
        "need_capacity": need_capacity(teacher, experts, arms[ROUTED].costs, scores.predicted),
        "codes": [
            {"code": code, "cost_ratio": expert.cost, "share": float(shares[code])}
            for code, expert in enumerate(experts)
        ],
        "kinds": kind_facts(scores.kinds, need_of(teacher, experts), arms[ROUTED].costs),
    }


def _networks(
    config: RunConfig, held: HeldOut, tasks: dict[str, Task], measured: dict[str, Measured]
) -> dict[str, Network]:
    """The networks with their losses, costs and times; they are timed by one task, when no other runs."""
    timing = _time_all.options(**resources(config)).remote(config, held, tasks)
    root, networks = home(config, "finetune"), {}
    milliseconds = ray.get(timing)
    for name, task in tasks.items():
        found = measured[name].scores
        first = found[0].distances
        networks[name] = Network(
            losses=np.stack([each.losses for each in found]),
            distances=np.zeros(len(held.keys)) if first is None else first,
            cost=1.0 if task.network is None else _cost(root, task.network),
            milliseconds=milliseconds[name],
            steps=0 if task.network is None else trained_steps(root, name),
        )
    return networks


def _cost(root: Store, folder: str) -> float:
    """The MACs ratio that a network's own folder states."""
    with tempfile.TemporaryDirectory() as scratch:
        return read_expert_info(root.fetch(folder, scratch)).cost.ratio


def _by_arm(
    measured: dict[str, Measured], codes: np.ndarray, drawn: list[int], singles: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, list[bytes]]]:
    """Features and pictures of the drawn rows, in their order, of every arm that draws."""
    if not drawn:
        return {}, {}
    sources = {TEACHER: [measured[TEACHER]] * len(drawn)}
    sources[ROUTED] = [measured[network_of(int(codes[row]))] for row in drawn]
    sources |= {name: [measured[name]] * len(drawn) for name in singles}
    pairs = {name: list(zip(drawn, mine, strict=True)) for name, mine in sources.items()}
    features = {name: np.stack([source.features[row] for row, source in each]) for name, each in pairs.items()}
    return features, {name: [source.pictures[row] for row, source in each] for name, each in pairs.items()}


def _image_scores(scores: RunScores) -> dict[str, dict[str, float | None]]:
    if scores.real is None:
        return {}
    real, texts = torch.from_numpy(scores.real), None if scores.texts is None else torch.from_numpy(scores.texts)
    return {
        name: image_scores(scores.extractor, torch.from_numpy(ours), real, texts)
        for name, ours in scores.features.items()
    }


def _measure_all(config: RunConfig, held: HeldOut, tasks: dict[str, Task]) -> dict[str, Measured]:
    """The teacher predicts first; the other networks are compared with its predictions, so they start after it."""
    shared, settings, share = ray.put(held), ray.put(config), resources(config)
    answering: Any = _answer.options(num_returns=2, **share)  # Ray's types know of one return
    teacher, answers = answering.remote(settings, shared)
    # The longest first, so that no long task starts last.
    order = sorted(tasks, key=lambda name: -len(tasks[name].drawn))
    pending = {
        _measure.options(**share).remote(settings, shared, tasks[name], answers if tasks[name].noises else []): name
        for name in order
    }
    found: dict[str, Measured] = {}
    with Progress("evaluate", len(tasks)) as progress:
        progress.update(0)
        while pending:
            (ready,), _ = ray.wait(list(pending))
            name = pending.pop(ready)
            found[name] = ray.get(ready)
            progress.update(len(found), network=name)
    found[TEACHER] = replace(found[TEACHER], scores=[ray.get(teacher)])
    return found


@ray.remote
def _answer(config: RunConfig, held: HeldOut) -> tuple[RowScores, list[Tensor]]:
    """The teacher on all rows at the first noise: its scores, and apart from them its predictions."""
    parts = load_pipeline_parts(config.model, config.storage)
    unet, rows = parts.unet.to(device_of(config)), list(range(len(held.keys)))
    found = score_rows(config.evaluate, parts, unet, held, rows, keep_answers=True)
    return replace(found, answers=[]), found.answers


@ray.remote
def _measure(config: RunConfig, held: HeldOut, task: Task, answers: list[Tensor]) -> Measured:
    parts = load_pipeline_parts(config.model, config.storage)
    unet = _load(config, parts, task.network)
    pipeline = parts.pipeline(unet).to(device_of(config))
    features, pictures = generate(config, pipeline, held, task.drawn)
    rows = list(range(len(held.keys)))
    scores = [
        score_rows(config.evaluate, parts, unet, held, rows, noise, compare_with=[] if noise else answers)
        for noise in range(task.noises)
    ]
    return Measured(scores, features, pictures)


@ray.remote
def _time_all(config: RunConfig, held: HeldOut, tasks: dict[str, Task]) -> dict[str, float]:
    """The networks one after another in one process: they differ by nothing but themselves."""
    parts = load_pipeline_parts(config.model, config.storage)
    return {
        name: forward_milliseconds(
            config.evaluate, parts, _load(config, parts, task.network).to(device_of(config)), held
        )
        for name, task in tasks.items()
    }


def _load(config: RunConfig, parts: PipelineParts, network: str | None) -> nn.Module:
    if network is None:
        return parts.unet.eval()
    with tempfile.TemporaryDirectory() as scratch:
        return load_expert(home(config, "finetune").fetch(network, scratch)).eval()
