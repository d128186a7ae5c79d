"""The workers of a teacher's training: `torchrun` starts them, each holds the whole model and a share of the batch."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Workers:
    """This worker's place among the others."""

    rank: int
    count: int

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over the workers in one all-reduce."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def mean(self, value: float) -> float:
        """The mean of one number over the workers; all of them must call it."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.item() / self.count

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


def join_workers() -> Workers:
    """Join the group that `torchrun` describes in the environment; a plain `python` is a group of one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        dist.init_process_group("gloo")
    return Workers(int(os.environ.get("RANK", "0")), count)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, over parameters."""
    pairs: list[tuple[Tensor, Tensor]] = list(zip(average.parameters(), model.parameters(), strict=True))
    torch._foreach_lerp_([a for a, _ in pairs], [m for _, m in pairs], 1 - decay)
