"""A training stage small enough to reason about: a linear map, a shared code, batches that number and rank decide."""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from torch import Tensor, nn

from aptp.latents import Batch
from aptp.losses import LossTerms
from aptp.noise import Noise
from aptp_platform.config import EngineConfig, TrainingConfig
from aptp_platform.storage.store import Store
from aptp_platform.train.loop import Work


class ToyModule(nn.Module):
    """Odd sizes, a parameter that no submodule owns, a frozen part and a buffer that remembers."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.linear = nn.Linear(7, 3)
        self.codes = nn.Parameter(torch.empty(3, 11))
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, batch: Batch, *, noise: Noise, gather: Any) -> LossTerms:
        own_noise = noise.normal(5, use="embeddings")
        shared = noise.of(torch.arange(len(self.codes))).normal(self.codes.shape[1], use="codes")
        own = self.linear(self.frozen(batch.embeddings + 0.1 * own_noise)) @ (self.codes + 0.1 * shared)
        everybody = gather(own)
        self.seen += torch.tensor([1.0, float(everybody.detach().mean())])
        return LossTerms({"own": own.square().mean(), "all": everybody.std(0).log().square().sum() + self.seen.mean()})


@dataclass(frozen=True)
class ToySpec:
    """Every rank writes its losses to `folder/losses-<rank>-<process>.jsonl`, and the last one causes `faults`; each
    start of one leaves a file `folder/started-<rank>-<process>`.

    faults: (number of a batch, what happens before it, once): "worker" and "node" are killed, a node gets a "notice"
        that it will go. pause: seconds before each batch.
    """

    folder: Path
    training: TrainingConfig
    faults: tuple[tuple[int, str], ...] = ()
    pause: float = 0.0
    note: str = ""
    name: str = "toy"
    seed: int = 3

    @property
    def log(self) -> Store:
        return Store.open(self.folder / "tensorboard")

    @property
    def resolved(self) -> str:
        return f"note: {self.note}"

    def depends_on(self) -> Mapping[str, Any]:
        return {"note": self.note}

    def build(self, device: torch.device) -> Work:
        module = ToyModule()
        rank = ray.train.get_context().get_world_rank()
        (self.folder / f"started-{rank}-{os.getpid()}").touch()
        module.register_forward_hook(partial(self._record, rank))
        return Work(module, self._batches, self._tell, self._finish)

    def _batches(self, start: int, rank: int, ranks: int) -> Iterator[Batch]:
        for number in range(start, 1000):
            time.sleep(self.pause)
            for at, fault in self.faults:
                done = self.folder / f"fault-{at}"
                if number == at and rank == ranks - 1 and not done.exists():
                    done.write_text(fault)
                    _cause(fault)
            size = self.training.batch_size
            rows = torch.randn(size, 5, generator=_seeded(number)).chunk(ranks)[rank]
            identities = (number * size + torch.arange(size)).chunk(ranks)[rank]
            yield Batch(rows[:, :4].reshape(-1, 1, 2, 2), rows[:, None], rows, identities)

    def _record(self, rank: int, module: nn.Module, arguments: Any, terms: LossTerms) -> None:
        with (self.folder / f"losses-{rank}-{os.getpid()}.jsonl").open("a") as log:
            log.write(json.dumps({name: float(term.detach()) for name, term in terms.terms.items()}) + "\n")

    def _tell(self, terms: LossTerms) -> dict[str, float | str]:
        with (self.folder / "told.jsonl").open("a") as log:
            log.write(json.dumps(terms.scalars()) + "\n")
        return {}

    def _finish(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: value.tolist() for name, value in values.items()}


def _seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _cause(fault: str) -> None:
    context = ray.get_runtime_context()
    if fault == "notice":
        reason, deadline = 2, int(1000 * (time.time() + 300))  # preemption
        accepted, why = GcsClient(address=context.gcs_address).drain_node(
            context.get_node_id(), reason, "test", deadline
        )
        assert accepted, why
    else:
        os.kill(os.getppid() if fault == "node" else os.getpid(), signal.SIGKILL)  # a worker's parent is its raylet
        time.sleep(60)


def losses_of(folder: Path, rank: int = 0) -> list[list[dict[str, float]]]:
    """The losses of each process that was that rank, in the order of their start."""
    logs = sorted(folder.glob(f"losses-{rank}-*.jsonl"), key=lambda log: log.stat().st_mtime)
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


def toy(folder: Path, *, steps: int, every: int = 100, workers: int = 1, zero_stage: Any = 1, **more: Any) -> ToySpec:
    """A toy stage that works in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    training = TrainingConfig(
        steps=steps,
        batch_size=8,
        learning_rate=1e-2,
        warmup_steps=3,
        checkpoint_every=every,
        workers=workers,
        cpus_per_worker=0.5,
        engine=EngineConfig(zero_stage=zero_stage),
    )
    return replace(ToySpec(folder, training), **more)
