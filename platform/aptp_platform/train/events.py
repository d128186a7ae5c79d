"""What a person sees of a training run: progress lines, and for TensorBoard scalars, pictures, usage and the config.

Event files are uploaded beside the run at every checkpoint, in the background; `config.yaml` beside them is the whole
config as the run resolved it.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from tensorboardX import SummaryWriter

from aptp.losses import LossTerms
from aptp_platform.run.progress import Progress
from aptp_platform.storage.store import Store
from aptp_platform.train.curve import Measured

LOG_EVERY = 5  # steps; between them nothing waits for the device
HEAT_COLUMNS = 256  # at most; a longer run shows every second column, every fourth, ...
CELL = 12  # pixels
USED = (8, 48, 107)  # the colour of a code that all prompts use; white is none


def should_log(done: int, start: int, steps: int) -> bool:
    """Whether a run that began behind step `start` tells what step `done` gave."""
    return done % LOG_EVERY == 0 or done in (start + 1, steps)


class Events:
    """Rank 0 holds one in a `with` block. A run that goes on writes beside the files of the run before.

    Args:
        start: the steps behind this run. images: that a step trains on, all ranks together.
        facts: what is worth a progress line, beside the loss and the speed.
    """

    def __init__(
        self,
        name: str,
        log: Store,
        config: str,
        start: int,
        steps: int,
        images: int,
        facts: Callable[[LossTerms], Mapping[str, float | str]],
    ) -> None:
        self._log, self._config, self._start, self._steps = log, config, start, steps
        self._images, self._facts = images, facts
        self._progress = Progress(name, steps)
        self._folder = tempfile.TemporaryDirectory(prefix="aptp-events-")
        self._writer = SummaryWriter(self._folder.name)
        self._usage: list[Float[np.ndarray, " code"]] = []
        self._last = (start, time.monotonic())
        self._uploader = ThreadPoolExecutor(1)
        self._uploading: Future[None] | None = None

    def __enter__(self) -> "Events":
        self._progress.__enter__()
        self._writer.add_text("config", f"```yaml\n{self._config}\n```", self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._progress.__exit__(kind, *error)
        self._writer.close()
        self._uploader.shutdown()
        if kind is None:
            self._upload()
        self._folder.cleanup()

    def step(self, done: int, terms: LossTerms) -> None:
        """Tell what the step just done gave."""
        before, then = self._last
        self._last = (done, time.monotonic())
        speed = (done - before) * self._images / (self._last[1] - then)
        scalars = terms.scalars()
        for name, value in {**scalars, "images/s": speed}.items():
            self._writer.add_scalar(name, value, done)
        for name, values in terms.metrics.items():
            for index, each in enumerate(values.tolist() if values.ndim == 1 else ()):
                self._writer.add_scalar(f"{name}/{index:02d}", each, done)
        if "usage" in terms.metrics:
            self._usage.append(terms.metrics["usage"].cpu().numpy())
        self._progress.update(done, **self._facts(terms), loss=scalars["total"], **{"images/s": speed})

    def heldout(self, done: int, point: Measured) -> None:
        """What held-out rows lose now, and at what cost."""
        for name, value in (("extra_loss", point.extra_loss), ("cost_ratio", point.cost_ratio)):
            self._writer.add_scalar(f"heldout/{name}", value, done)

    def pictures(self, done: int, drawn: Mapping[str, UInt8[np.ndarray, "row column height width 3"]]) -> None:
        """Grids of pictures, by name."""
        for name, grid in drawn.items():
            rows, columns, height, width, _ = grid.shape
            whole = grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
            self._writer.add_image(name, whole, done, dataformats="HWC")

    def publish(self, done: int) -> None:
        """Upload the event files so far, unless an earlier upload is still on its way: the next one brings all."""
        if self._usage:
            self._writer.add_image("usage_by_step", heat_map(np.stack(self._usage)), done, dataformats="HWC")
        self._writer.flush()
        if self._uploading is None or self._uploading.done():
            self._uploading = self._uploader.submit(self._upload)

    def _upload(self) -> None:
        self._log.publish(self._folder.name, f"from-{self._start:08d}")
        with self._log.open_file("config.yaml", "wb") as stream:
            stream.write(self._config.encode())


def heat_map(usage: Float[np.ndarray, "time code"]) -> UInt8[np.ndarray, "height width 3"]:
    """Shares as colours: a row of cells a code, time from left to right."""
    usage = usage[:: -(-len(usage) // HEAT_COLUMNS)]
    strength = (usage / max(float(usage.max()), 1e-9)).T[..., None]
    colours = 255 - strength * (255 - np.array(USED))
    return colours.round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
