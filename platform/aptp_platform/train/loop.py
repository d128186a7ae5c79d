"""One worker's loop, for any stage: its batches, a step, a line of progress, now and then a checkpoint.

Everything that a step depends on is derived from its number: the rows, the learning rate, the noise. So a run that goes
on from a checkpoint does what it would have done undisturbed.
"""

import hashlib
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from tensorboardX import SummaryWriter
from torch import Tensor, nn

from aptp.latents import Batch
from aptp.losses import LossTerms
from aptp_platform.config import TrainingConfig
from aptp_platform.progress import Progress
from aptp_platform.storage import Store
from aptp_platform.train.checkpoint import Restored, save_checkpoint
from aptp_platform.train.engine import build_engine, set_learning_rate, whole_state

LOG_EVERY = 5  # steps; between them nothing waits for the device

Summary = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A stage, built on a worker.

    module: `module(batch, step=, image_generator=, code_generator=, gather=)` gives `LossTerms`; what requires
        gradients in it is trained.
    batches: (first, rank, ranks) to that rank's batches from number `first` on, all of one size, without end.
    facts: what is worth a progress line, beside the loss and the speed.
    finish: called on rank 0 with the trained values by name; publishes the result and returns its summary.
    """

    module: nn.Module
    batches: Callable[[int, int, int], Iterator[Batch]]
    facts: Callable[[LossTerms], Mapping[str, float | str]]
    finish: Callable[[Mapping[str, Tensor]], Summary]


class Stage(Protocol):
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

    def depends_on(self) -> Mapping[str, Any]:
        """What the result depends on, as plain data; a checkpoint is only for runs with the same."""

    def build(self, device: torch.device) -> Work: ...


def train(settings: dict[Any, Any]) -> Summary | None:
    """What every worker of a group runs. Rank 0 returns the summary.

    Args:
        settings: `stage`, the pickled `Stage`: the group's controller, which unpickles settings too, can do without it.
    """
    stage: Stage = pickle.loads(settings["stage"])
    training, rank = stage.training, ray.train.get_context().get_world_rank()
    ranks, device = ray.train.get_context().get_world_size(), ray.train.torch.get_device()
    work = stage.build(device)
    engine, start = _begin(work.module, stage)
    accumulation = training.engine.gradient_accumulation
    batches = work.batches(start * accumulation, rank, ranks)
    with ExitStack() as stack:
        report = stack.enter_context(_Report(stage, work, start, ranks)) if rank == 0 else None
        for step in range(start, training.steps):
            set_learning_rate(engine, training, step)
            for number in range(step * accumulation, (step + 1) * accumulation):
                terms = engine(
                    next(batches).to(device),
                    step=step,
                    image_generator=_noise(stage.seed, number, f"images {rank}"),
                    code_generator=_noise(stage.seed, number, "codes"),
                    gather=gather_rows,
                )
                engine.backward(terms.total)
                engine.step()
            done = step + 1
            if report is not None and (done % LOG_EVERY == 0 or done in (start + 1, training.steps)):
                report.step(done, terms)
            if done % training.checkpoint_every == 0 or done == training.steps:
                _hand_over(engine, stage, done, terms)
                if report is not None:
                    report.publish()
    values = {name: state["value"].cpu().clone() for name, state in whole_state(engine, moments=False)}
    return work.finish(values) if rank == 0 else None


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


def _begin(module: nn.Module, stage: Stage) -> tuple[Any, int]:
    """The engine, and how many steps are behind it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return build_engine(module, stage.training), 0
    with checkpoint.as_directory() as folder, Restored(Path(folder), stage.depends_on()) as restored:
        restored.fill(module)
        engine = build_engine(module, stage.training)
        restored.fill_moments(engine)
        return engine, restored.step


def _hand_over(engine: Any, stage: Stage, step: int, terms: LossTerms) -> None:
    """Give this rank's part of a checkpoint to Ray, which uploads it in the background and registers it when whole."""
    folder = Path(tempfile.mkdtemp(prefix="aptp-checkpoint-"))
    save_checkpoint(engine, folder, step, stage.depends_on())
    ray.train.report(
        {"step": step, "loss": float(terms.total.detach())},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{step:08d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
    )


def _noise(seed: int, number: int, use: str) -> torch.Generator:
    """A generator for one use in one batch; the same on every device and after every restart."""
    digest = hashlib.sha256(f"{seed}/{number}/{use}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class _Report:
    """What a person sees of a run: progress lines, and scalars for TensorBoard."""

    def __init__(self, stage: Stage, work: Work, start: int, ranks: int) -> None:
        self._stage, self._work, self._start = stage, work, start
        self._images = stage.training.batch_size * stage.training.engine.gradient_accumulation * ranks
        self._progress = Progress(stage.name, stage.training.steps)
        self._folder = tempfile.TemporaryDirectory(prefix="aptp-events-")
        self._writer = SummaryWriter(self._folder.name)
        self._last = (start, time.monotonic())

    def __enter__(self) -> "_Report":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._writer.close()
        self._folder.cleanup()

    def step(self, done: int, terms: LossTerms) -> None:
        before, then = self._last
        self._last = (done, time.monotonic())
        speed = (done - before) * self._images / (self._last[1] - then)
        scalars = terms.scalars()
        for name, value in {**scalars, "images/s": speed}.items():
            self._writer.add_scalar(name, value, done)
        for name, values in terms.metrics.items():
            for index, each in enumerate(values.tolist() if values.ndim == 1 else ()):
                self._writer.add_scalar(f"{name}/{index:02d}", each, done)
        facts = {**self._work.facts(terms), "loss": scalars["total"], "images/s": speed}
        self._progress.update(done, **facts)

    def publish(self) -> None:
        """Event files so far; a run that goes on writes beside those of the run before."""
        self._writer.flush()
        self._stage.log.publish(self._folder.name, f"from-{self._start:08d}")
