"""The held-out extra loss along a training: what a network loses more than the teacher on rows that nothing trains on.

It is measured at checkpoints if a training's `heldout_rows` is not 0. The training itself reads none of it. The points
are in `<stage>/curves/<name>.json`; a training that goes on keeps those up to the step that it goes on from.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

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
