"""The held-out extra loss along a training: what a network loses more than the teacher on rows that nothing trains on.

It is measured at checkpoints if a training's `heldout_rows` is not 0. The training itself reads none of it. The points
are in `<stage>/curves/<name>.json`; a training that goes on keeps those up to the step that it goes on from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from aptp_platform.storage.store import Store


@dataclass(frozen=True)
class Measured:
    """extra_loss: paired denoising loss above the teacher's, mean over the rows. cost_ratio: their mean MACs ratio."""

    extra_loss: float
    rows: int
    cost_ratio: float


@dataclass(frozen=True)
class Point(Measured):
    """What was measured after `step` steps."""

    step: int


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


class Curve:
    """The points of one training; rank 0 keeps them in a file.

    Args:
        folder: of the file. measure: what the network of the moment loses.
    """

    def __init__(self, folder: Store, name: str, measure: Callable[[], Measured]) -> None:
        self._folder, self._file, self.measure = folder, f"{name}.json", measure
        self._points: list[Point] = []

    def go_on(self, step: int) -> None:
        """Keep what an earlier start has measured up to this step."""
        if step and self._folder.exists(self._file):
            before = [Point(**point) for point in self._folder.read_json(self._file)]
            self._points = [point for point in before if point.step <= step]

    def add(self, step: int) -> Point:
        """Measure, and write the file."""
        self._points.append(Point(**asdict(self.measure()), step=step))
        self._folder.write_json(self._file, self.points)
        return self._points[-1]

    @property
    def points(self) -> list[dict[str, float]]:
        """As plain data."""
        return [asdict(point) for point in self._points]
