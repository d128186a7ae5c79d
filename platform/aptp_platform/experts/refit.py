"""Measures again, once the experts are trained, what each costs a prompt: fine-tuning has changed it.

Training prompts run through every expert and the teacher, at noise that no training step drew. The router's need head
is solved for what was measured, and the price is set at which these prompts cost the budget. The router that evaluation
and the release use is published here; one that routes by similarity is published as it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
import torch
from torch import Tensor, nn

from aptp.calibration import set_price
from aptp.expert import load_expert
from aptp.latents import encode_texts
from aptp.losses import NoiseSchedule, per_sample_error
from aptp.need import fit_need
from aptp.noise import Noise
from aptp.router import Router
from aptp.routes import require_used
from aptp_platform.config import RunConfig
from aptp_platform.data.encoded import choose_caption, read_table, row_identity
from aptp_platform.models import PipelineParts, load_pipeline_parts
from aptp_platform.run.layout import FINETUNED, REFITTED, ROUTER, TRAIN_ROWS, assigned_router, home, network_of
from aptp_platform.run.progress import Progress
from aptp_platform.run.resources import require_room
from aptp_platform.storage.store import Store

TOLERANCE: Final = 0.01  # of the budget
MOST_BALANCE: Final = 100.0  # as good as equal shares
UNSEEN_STEP: Final = 2**31  # of the noise: far beyond any training step
ROWS_PER_TASK: Final = 256

Row = dict[str, Any]
Measured = tuple[Tensor, Tensor, Tensor]  # times (row, repeat), errors and losses (row, repeat, code)


def refit(config: RunConfig) -> dict[str, Any]:
    """Publish `refitted/router/`.

    Returns:
        the price, what the measured prompts cost at it, each code's share of them, and the mean loss predicted.

    Raises:
        ConfigError: a task is larger than the cluster.
        UnusedCodeError: there are fewer prompts than experts.
    """
    root = Store.open(config.root, config.storage)
    router = assigned_router(config)
    if router.need is None:
        _publish(router, root)
        return {"codes": router.num_codes, "routing": "similarity"}
    settings = config.refit
    demands = {"CPU": ("cpus_per_task", settings.cpus_per_task), "GPU": ("gpus_per_task", settings.gpus_per_task)}
    require_room("refit", None, 1, demands, spare=0.0)
    rows = _sample(home(config, "encode").join(TRAIN_ROWS), settings.prompts, config.seed)
    measured = _measure_all(config, rows, router.num_codes)
    times, errors, losses = (torch.cat(parts) for parts in zip(*measured, strict=True))
    embeddings = torch.from_numpy(np.stack([row["embedding"] for row in rows])).float()
    router.need = fit_need(embeddings, times, errors, losses, router.config.need)
    budget, balance = config.router.budget, settings.balance
    usage = set_price(router, embeddings, budget, tolerance=inf, balance=balance)
    while not usage.all() and balance < MOST_BALANCE:  # an expert without prompts is deployed for nothing
        balance = max(2 * balance, 0.01)
        usage = set_price(router, embeddings, budget, tolerance=inf, balance=balance)
    require_used(usage)
    ratio = float((usage * router.costs).sum())
    if abs(ratio / budget - 1) > TOLERANCE:  # the experts are trained: report it and use them
        print(
            f"[refit] at no price do the prompts cost {budget:g} of all MACs with these experts; nearest: {ratio:.3f}"
        )
    routes = router.route_embeddings(embeddings)
    assert routes.losses is not None
    _publish(router, root)
    return {
        "codes": router.num_codes,
        "prompts": len(rows),
        "price": round(float(router.price), 4),
        "MACs ratio": round(ratio, 4),
        "balance": round(balance, 4),
        "usage": [round(share, 6) for share in usage.tolist()],
        "predicted loss": round(float(routes.losses.gather(1, routes.indices[:, None]).mean()), 5),
        "measured losses": [round(loss, 5) for loss in losses.mean((0, 1)).tolist()],
    }


def _publish(router: Router, root: Store) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        router.save(Path(scratch) / ROUTER)
        root.join(REFITTED).publish(Path(scratch) / ROUTER, ROUTER, last=("router.json",))


def _sample(encoded: Store, count: int, seed: int) -> list[Row]:
    """At most `count` rows, evenly taken from all files, each with one caption and that caption's embedding."""
    names = encoded.require("*.parquet", "root, or run the encode job first")
    files = [read_table(encoded, name, ["key", "captions"]) for name in names]
    stride = max(1, -(-sum(map(len, files)) // count))
    found, seen = [], 0
    for name, keys in zip(names, files, strict=True):
        wanted = range(-seen % stride, len(keys), stride)
        seen += len(keys)
        if not wanted:
            continue
        table = read_table(encoded, name)
        for index in wanted:
            row = table[index]
            caption = choose_caption(row["key"], len(row["captions"]), 0, seed)
            found.append(
                {
                    "key": row["key"],
                    "latents": row["latents"],
                    "caption": row["captions"][caption],
                    "embedding": np.asarray(row["embeddings"][caption], dtype=np.float32),
                }
            )
    return found


def _measure_all(config: RunConfig, rows: Sequence[Row], num_codes: int) -> list[Measured]:
    task = _measure.options(num_cpus=config.refit.cpus_per_task, num_gpus=config.refit.gpus_per_task)
    chunks = [rows[start : start + ROWS_PER_TASK] for start in range(0, len(rows), ROWS_PER_TASK)]
    settings = ray.put(config)
    pending = {task.remote(settings, chunk, num_codes): index for index, chunk in enumerate(chunks)}
    found: dict[int, Measured] = {}
    with Progress("refit", len(chunks)) as progress:
        progress.update(0)
        while pending:
            (ready,), _ = ray.wait(list(pending))
            found[pending.pop(ready)] = ray.get(ready)
            progress.update(len(found))
    return [found[index] for index in range(len(chunks))]


@ray.remote
@torch.no_grad()
def _measure(config: RunConfig, rows: Sequence[Row], num_codes: int) -> Measured:
    """The teacher's answers are computed once and compared with those of one expert after another."""
    parts = load_pipeline_parts(config.model, config.storage)
    device = torch.device("cuda" if config.refit.gpus_per_task else "cpu")
    batches = list(_batches(config, parts, rows, device))
    answers = [_answer(parts.unet.to(device), batch) for batch in batches]
    errors, losses = [], []
    tuned = home(config, "finetune").join(FINETUNED)
    for code in range(num_codes):
        with tempfile.TemporaryDirectory() as scratch:
            expert = load_expert(tuned.fetch(network_of(code), scratch)).to(device)
        pairs = list(zip(batches, answers, strict=True))
        answered = [_answer(expert, batch) for batch in batches]
        errors.append(torch.cat([per_sample_error(a, b) for a, b in zip(answered, answers, strict=True)]))
        added = [
            per_sample_error(own, batch["target"]) - per_sample_error(teachers, batch["target"])
            for own, (batch, teachers) in zip(answered, pairs, strict=True)
        ]
        losses.append(torch.cat(added))
    repeats = config.refit.repeats
    shape = (repeats, len(rows), num_codes)
    times = torch.cat([batch["times"] for batch in batches]).view(repeats, len(rows)).T
    return (
        times.cpu(),
        torch.stack(errors, 1).view(shape).transpose(0, 1).cpu(),
        torch.stack(losses, 1).view(shape).transpose(0, 1).cpu(),
    )


def _batches(
    config: RunConfig, parts: PipelineParts, rows: Sequence[Row], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Every row at `repeats` times, one in each of as many equal intervals; repeat after repeat."""
    schedule, text_encoder = NoiseSchedule(parts.scheduler).to(device), parts.text_encoder.to(device)
    repeats, size = config.refit.repeats, config.refit.batch_size
    for repeat in range(repeats):
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            ids = torch.tensor([row_identity(row["key"], 0) for row in some], device=device)
            noise = Noise(config.seed, UNSEEN_STEP + repeat, ids)
            latents = torch.from_numpy(np.stack([row["latents"] for row in some])).float().to(device)
            drawn = noise.normal(*latents.shape[1:], use="noise")
            times = (repeat + noise.uniform(use="times")) / repeats
            timesteps = (times * len(schedule)).long()
            yield {
                "noisy": schedule.noisy(latents, drawn, timesteps),
                "timesteps": timesteps,
                "texts": encode_texts(parts.tokenizer, text_encoder, [row["caption"] for row in some]),
                "target": schedule.target(latents, drawn, timesteps),
                "times": times,
            }


def _answer(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return unet.eval()(batch["noisy"], batch["timesteps"], batch["texts"], return_dict=False)[0]
