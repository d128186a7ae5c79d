"""Networks in training on held-out rows, beside the teacher: what a curve's points are measured by."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from aptp.codes import PruningSpace
from aptp.gates import gated
from aptp_platform.config import RunConfig, TrainingConfig
from aptp_platform.data.heldout import read_held_out, row_losses
from aptp_platform.models import PipelineParts
from aptp_platform.train.curve import Measured


class HeldOutTest:
    """The first `count` held-out rows and the teacher's losses on them; networks are measured on them, or on some.

    A row's caption, noise and timesteps depend on its key alone, so points differ by nothing but the network.
    """

    def __init__(
        self, config: RunConfig, parts: PipelineParts, count: int, teacher: Mapping[str, float] | None = None
    ) -> None:
        """teacher: the full model's losses by key; missing ones are measured."""
        self._config, self._parts, self._known = config.evaluate, parts, teacher or {}
        self._held = read_held_out(config, count)

    @classmethod
    def of(
        cls, config: RunConfig, parts: PipelineParts, training: TrainingConfig, teacher: Mapping[str, float]
    ) -> "HeldOutTest | None":
        """What a training is measured on; None if it is not."""
        if not training.heldout_rows:
            return None
        return cls(config, parts, training.heldout_rows, teacher)

    @property
    def embeddings(self) -> Float[Tensor, "row dim"]:
        return self._held.embeddings

    def of_network(self, network: nn.Module, rows: Sequence[int], cost: float) -> Measured:
        """One network on some of the rows."""
        return self._measured(self._losses(network, rows), rows, [cost] * len(rows))

    def under_codes(
        self,
        network: nn.Module,
        space: PruningSpace,
        masks: Float[Tensor, "code gate"],
        costs: Float[Tensor, " code"],
        routes: Sequence[int],
    ) -> Measured:
        """A network on all rows, each under the mask of its route."""
        losses = np.empty(len(routes))
        with gated(network, space) as gates:
            for code in sorted(set(routes)):
                mine = [row for row in range(len(routes)) if routes[row] == code]
                gates.set(masks[code : code + 1])
                losses[mine] = self._losses(network, mine)
        ratios = costs.tolist()
        return self._measured(losses, range(len(routes)), [ratios[code] for code in routes])

    def _measured(self, losses: Float[np.ndarray, " row"], rows: Sequence[int], costs: Sequence[float]) -> Measured:
        extra = losses - self._teacher[list(rows)]
        return Measured(float(extra.mean()), len(rows), float(np.mean(costs)))

    @cached_property
    def _teacher(self) -> Float[np.ndarray, " row"]:
        keys = self._held.keys
        missing = [row for row, key in enumerate(keys) if key not in self._known]
        losses = np.array([self._known.get(key, 0.0) for key in keys])
        if missing:
            losses[missing] = self._losses(self._parts.unet, missing)
        return losses

    @torch.no_grad()
    def _losses(self, network: nn.Module, rows: Sequence[int]) -> Float[np.ndarray, " row"]:
        training = network.training
        network.eval()
        losses = row_losses(self._config, self._parts, network, self._held, list(rows))
        network.train(training)
        return losses
