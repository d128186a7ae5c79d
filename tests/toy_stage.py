"""A training stage small enough to reason about: a linear map, a shared code, batches that number and rank decide."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aptp.latents import Batch
from aptp.losses import LossTerms
from aptp_platform.config import EngineConfig, TrainingConfig
from aptp_platform.storage import Store
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

    def forward(
        self,
        batch: Batch,
        *,
        step: int,
        image_generator: torch.Generator,
        code_generator: torch.Generator,
        gather: Any,
    ) -> LossTerms:
        noise = torch.randn(batch.embeddings.shape, generator=image_generator)
        shared = torch.randn(self.codes.shape, generator=code_generator)
        own = self.linear(self.frozen(batch.embeddings + 0.1 * noise)) @ (self.codes + 0.1 * shared)
        everybody = gather(own)
        self.seen += torch.tensor([1.0, float(everybody.detach().mean())])
        return LossTerms({"own": own.square().mean(), "all": everybody.std(0).log().square().sum() + self.seen.mean()})


@dataclass(frozen=True)
class ToyStage:
    """Its rank 0 writes every total loss to `folder/losses-<steps>.jsonl`; `kill_at` ends the worker there, once."""

    folder: Path
    training: TrainingConfig
    kill_at: int | None = None
    note: str = ""
    name: str = "toy"
    seed: int = 3

    @property
    def log(self) -> Store:
        return Store.open(self.folder / "tensorboard")

    def depends_on(self) -> Mapping[str, Any]:
        return {"note": self.note}

    def build(self, device: torch.device) -> Work:
        module = ToyModule()
        module.register_forward_hook(self._record)
        return Work(module, self._batches, lambda terms: {}, self._finish)

    def _batches(self, start: int, rank: int, ranks: int) -> Iterator[Batch]:
        for number in range(start, 1000):
            if number == self.kill_at and not (self.folder / "killed").exists():
                (self.folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            rows = torch.randn(4 * ranks, 5, generator=torch.Generator().manual_seed(number))[rank::ranks]
            yield Batch(rows[:, :4].reshape(4, 1, 2, 2), rows[:, None], rows)

    def _record(self, module: nn.Module, arguments: Any, terms: LossTerms) -> None:
        with (self.folder / f"losses-{os.getpid()}.jsonl").open("a") as log:
            log.write(json.dumps({name: float(term.detach()) for name, term in terms.terms.items()}) + "\n")

    def _finish(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: value.tolist() for name, value in values.items()}


def toy(folder: Path, *, steps: int, every: int = 100, workers: int = 1, zero_stage: Any = 1, **more: Any) -> ToyStage:
    """A toy stage that works in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    training = TrainingConfig(
        steps=steps,
        batch_size=4,
        learning_rate=1e-2,
        warmup_steps=3,
        checkpoint_every=every,
        workers=workers,
        cpus_per_worker=0.5,
        engine=EngineConfig(zero_stage=zero_stage),
    )
    return replace(ToyStage(folder, training), **more)
