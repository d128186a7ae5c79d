"""One worker's loop, for any stage: its batches, a step, a line of progress, now and then a checkpoint.

Everything that a step depends on is derived from its number: the rows, the learning rate, the noise. So a run that goes
on from a checkpoint does what it would have done undisturbed.
"""

import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor, nn

from aptp.latents import Batch
from aptp.losses import LossTerms
from aptp.noise import Noise
from aptp_platform.config import ConfigError, TrainingConfig
from aptp_platform.storage.errors import DamagedError
from aptp_platform.storage.store import Store
from aptp_platform.train.checkpoint import Restored, save_checkpoint
from aptp_platform.train.curve import Curve
from aptp_platform.train.engine import build_engine, runs_on_all_ranks_only, set_learning_rate, whole_state
from aptp_platform.train.events import Events, should_log

NOTICE_EVERY = 10  # steps; all ranks ask together whether a node of theirs is about to go

SCORE = "loss"  # of a checkpoint: the mean since the one before
LASTING = (ConfigError, DamagedError)  # what no restart of the workers mends

CURVE = "curve"  # what held-out rows have lost so far: the points as plain data

Summary = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A stage, built on a worker.

    module: `module(batch, noise=, gather=)` gives `LossTerms`; what requires
        gradients in it is trained.
    batches: (first, rank, ranks) to that rank's batches from number `first` on, all of one size, without end.
    facts: what is worth a progress line, beside the loss and the speed.
    curve: what is measured on held-out rows at a checkpoint, if anything is.
    pictures: called on every rank at a checkpoint: grids (row, column, height, width, 3) of what the module draws now.
    finish: called on rank 0 with the trained values by name; publishes the result and returns its summary.
    """

    module: nn.Module
    batches: Callable[[int, int, int], Iterator[Batch]]
    facts: Callable[[LossTerms], Mapping[str, float | str]]
    finish: Callable[[Mapping[str, Tensor]], Summary]
    curve: Curve | None = None
    pictures: Callable[[], Mapping[str, np.ndarray]] = dict


class TrainingSpec(Protocol):
    """A training stage as the workers get it: a picklable value that knows how to build the rest."""

    @property
    def name(self) -> str:
        """What progress lines call it."""

    @property
    def training(self) -> TrainingConfig: ...

    @property
    def seed(self) -> int: ...

    @property
    def log(self) -> Store:
        """The folder of TensorBoard's event files."""

    @property
    def resolved(self) -> str:
        """The whole config, as YAML."""

    def depends_on(self) -> Mapping[str, Any]:
        """What the result depends on, as plain data; a checkpoint is only for runs with the same."""

    def build(self, device: torch.device) -> Work: ...


def train(settings: dict[Any, Any]) -> Summary | None:
    """What every worker of a group runs. Rank 0 returns the summary.

    Args:
        settings: `spec`, a pickled `TrainingSpec`: the group's controller unpickles settings too, and needs none of it.
    """
    spec: TrainingSpec = pickle.loads(settings["spec"])
    training, rank = spec.training, ray.train.get_context().get_world_rank()
    ranks, device = ray.train.get_context().get_world_size(), ray.train.torch.get_device()
    work = spec.build(device)
    engine, start = _begin(work.module, spec)
    accumulation = training.engine.gradient_accumulation
    batches = work.batches(start * accumulation, rank, ranks)
    images = training.batch_size * accumulation
    saved, noticed, losses = start, False, torch.zeros((), device=device)
    if work.curve is not None and rank == 0:
        work.curve.go_on(start)
    with ExitStack() as stack:
        events = None
        if rank == 0:
            names = (spec.name, spec.log, spec.resolved)
            events = stack.enter_context(Events(*names, start, training.steps, images, work.facts))
        for step in range(start, training.steps):
            set_learning_rate(engine, training, step)
            for _ in range(accumulation):
                batch = next(batches).to(device)
                terms = engine(batch, noise=Noise(spec.seed, step, batch.rows), gather=gather_rows)
                engine.backward(terms.total)
                engine.step()
            done = step + 1
            losses += terms.total.detach()
            if should_log(done, start, training.steps):
                told = _averaged(terms)
                if events is not None:
                    events.step(done, told)
            regular = done % training.checkpoint_every == 0 or done == training.steps
            urgent = done % NOTICE_EVERY == 0 and not noticed and ray.train.get_preemption_info() is not None
            noticed = noticed or urgent
            if regular and work.curve is not None:
                if events is not None:
                    events.heldout(done, work.curve.add(done))
                elif runs_on_all_ranks_only(training):
                    work.curve.measure()
            if regular or urgent:
                _report_checkpoint(engine, spec, done, float(_mean(losses)) / (done - saved), work.curve)
                saved, losses = done, torch.zeros_like(losses)
            if regular:
                pictures = work.pictures()
                if events is not None:
                    events.pictures(done, pictures)
                    events.publish(done)
    values = {name: state["value"].cpu().clone() for name, state in whole_state(engine, moments=False)}
    return work.finish(values) if rank == 0 else None


class EndAtOnce(ray.train.UserCallback):
    """Ends a run whose workers found what no restart of them mends: what this raises, Ray Train does not retry."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in worker_exceptions.values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, LASTING):
                raise cause


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks; each has as many. A gradient is summed over the ranks.

    All ranks compute the same loss of what was gathered and the engine averages gradients over them, so together that
    is the gradient of the loss of the global batch.
    """
    return rows if dist.get_world_size() == 1 else _GatherRows.apply(rows)  # type: ignore[no-untyped-call]


def _averaged(terms: LossTerms) -> LossTerms:
    """The terms of the batch of all ranks, whose shares are equal; without gradients."""
    values = {**terms.terms, **terms.metrics}
    joined = _mean(torch.cat([value.detach().float().flatten() for value in values.values()]))
    parts = dict(zip(values, joined.split([value.numel() for value in values.values()]), strict=True))
    found = {name: part.reshape(values[name].shape) for name, part in parts.items()}
    return LossTerms(
        {name: found[name] for name in terms.terms}, terms.weights, {name: found[name] for name in terms.metrics}
    )


def _mean(value: Tensor) -> Tensor:
    """The mean of the ranks' values."""
    if dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _begin(module: nn.Module, spec: TrainingSpec) -> tuple[Any, int]:
    """The engine, and how many steps are behind it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return build_engine(module, spec.training), 0
    with checkpoint.as_directory() as folder, Restored(Path(folder), spec.depends_on()) as restored:
        if restored.step > spec.training.steps:
            raise ConfigError(
                f"{spec.name}: run.steps: {spec.training.steps}: its checkpoint has {restored.step} steps behind it: "
                "set at least as many, or start the stage anew with --restart"
            )
        restored.fill(module)
        engine = build_engine(module, spec.training)
        restored.fill_moments(engine)
        if dist.get_rank() == 0:
            _log_resume(spec, restored, dist.get_world_size())
        return engine, restored.step


def _log_resume(spec: TrainingSpec, restored: Restored, ranks: int) -> None:
    line = f"[{spec.name}] goes on from step {restored.step}"
    if ranks != restored.ranks:
        line += (
            f" with {ranks} workers instead of {restored.ranks}: rows and noise are the same, but sums are formed in "
            "another order, so the losses are close to those of an undisturbed run, not bit-equal"
        )
    print(line, flush=True)


def _report_checkpoint(engine: Any, spec: TrainingSpec, step: int, loss: float, curve: Curve | None) -> None:
    """Give this rank's part of a checkpoint to Ray, which uploads it in the background and registers it when whole."""
    measured = {} if curve is None else {CURVE: curve.points}
    folder = Path(tempfile.mkdtemp(prefix="aptp-checkpoint-"))
    save_checkpoint(engine, folder, step, spec.depends_on())
    ray.train.report(
        {"training": spec.name, "step": step, SCORE: loss, **measured},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{step:08d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
    )
