"""The engine of an expert: a request joins at the next denoising step and leaves when its image is done or unwanted."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from jaxtyping import UInt8
from torch import Tensor

from aptp_platform.serve.cpu.turns import Turns
from aptp_platform.serve.engine.denoising import Denoiser, NotFiniteError, Sample, SampleSpec

_SMOOTHING: Final = 0.2  # weight of the newest cycle in the mean cycle time


@dataclass(frozen=True)
class Rendered:
    """An image of the engine. preview: its number among the unfinished ones, None for the finished image."""

    pixels: UInt8[Tensor, "height width 3"]
    queue_ms: float
    denoise_ms: float
    preview: int | None = None


@dataclass(frozen=True)
class Cycle:
    """One step of the batch, as it is told to an observer."""

    batch_size: int
    waiting: int
    seconds: float


class EngineFullError(RuntimeError):
    """Nobody more may wait; retry_after_s is when the queue should have drained."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class TooLateError(RuntimeError):
    """A request's time was over before it had a place in the batch."""


class RequestHandle:
    """A place in the engine, held while its `with` block lasts; leaving early is a cancellation.

    expires: the monotonic time after which it is not begun any more.
    """

    def __init__(self, spec: SampleSpec, expires: float) -> None:
        self.spec, self.expires = spec, expires
        self.sample: Sample | None = None  # None while it waits
        self.outbox: asyncio.Queue[Rendered | Exception] = asyncio.Queue()
        self.arrived = time.monotonic()
        self.started = 0.0
        self.unwanted = False

    def __enter__(self) -> RequestHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.unwanted = True

    @property
    def steps_left(self) -> int:
        return self.spec.num_inference_steps if self.sample is None else self.sample.steps_left

    @property
    def steps_done(self) -> int:
        return 0 if self.sample is None else self.sample.steps_done

    async def images(self) -> AsyncIterator[Rendered]:
        """The previews that the spec wants, then the finished image."""
        while True:
            item = await self.outbox.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.preview is None:
                return

    def deliver(self, pixels: Tensor, preview: int | None) -> None:
        queue_s, denoise_s = self.started - self.arrived, time.monotonic() - self.started
        self.outbox.put_nowait(Rendered(pixels, 1e3 * queue_s, 1e3 * denoise_s, preview))


@dataclass
class _Outcome:
    """What came of a cycle: who was stepped, who failed of what, and the pixels that are due, with their number."""

    stepped: list[RequestHandle] = field(default_factory=list)
    failed: list[tuple[RequestHandle, Exception]] = field(default_factory=list)
    due: list[tuple[RequestHandle, int | None, Tensor]] = field(default_factory=list)


class StepEngine:
    """Runs a `Denoiser` on a thread of its own for as many requests at once as fit; the event loop never blocks.

    A cycle is one piece of work for that thread: every exchange with the event loop in between would leave the device
    idle.

    An image does not depend on who shared the batch, beyond the rounding of a larger matrix product.

    Args:
        max_batch_size: samples that are denoised together.
        max_waiting: requests that may wait for a place; one more raises `EngineFullError`.
        whole_requests: newcomers wait until the whole batch is done, as batching servers do that know no steps. It is
            here to be compared with.
        turns: taken between steps, where more replicas than cores share a machine; None: computes whenever it has to.
        observe: called after every cycle, on the event loop.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        max_batch_size: int,
        max_waiting: int,
        whole_requests: bool = False,
        turns: Turns | None = None,
        observe: Callable[[Cycle], None] | None = None,
    ) -> None:
        if max_batch_size < 1 or max_waiting < 0:
            raise ValueError(
                f"max_batch_size {max_batch_size} must be at least 1, max_waiting {max_waiting} at least 0"
            )
        self._denoiser, self._whole_requests, self._observe = denoiser, whole_requests, observe
        self._turns, self._step_s = turns, 0.0  # of the shortest step so far; 0 before the first
        self._max_batch_size, self._max_waiting = max_batch_size, max_waiting
        self._waiting: deque[RequestHandle] = deque()
        self._running: list[RequestHandle] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="denoiser")
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self.cycle_s = 0.0  # mean seconds of a cycle; 0 before the first

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def drain_s(self) -> float:
        """Seconds until everything that is here now should be done."""
        steps = sum(handle.steps_left for handle in (*self._running, *self._waiting))
        return math.ceil(steps / self._max_batch_size) * self.cycle_s

    def check(self) -> None:
        """Raises what ended the engine, if something did."""
        if self._loop is not None and self._loop.done():
            self._loop.result()
            raise RuntimeError("the engine was closed")

    def submit(self, spec: SampleSpec, expires_in_s: float = math.inf) -> RequestHandle:
        """Takes a place now: `with engine.submit(spec) as handle: async for image in handle.images(): ...`

        Args:
            expires_in_s: if it still waits then, it is not begun, and its `images` raise `TooLateError`.

        Raises:
            EngineFullError: nobody more may wait.
        """
        self._drop_unwanted()
        if self._loop is None:
            self._loop = asyncio.get_running_loop().create_task(self._run())
        self.check()
        handle = RequestHandle(spec, time.monotonic() + expires_in_s)
        if len(self._waiting) >= self._max_waiting + self._max_batch_size - len(self._running):
            raise EngineFullError(len(self._waiting), self.drain_s)
        self._waiting.append(handle)
        self._wake.set()
        return handle

    async def generate(self, spec: SampleSpec) -> Rendered:
        """The finished image of one spec; cancelling the call takes it out of the batch at the next step."""
        with self.submit(spec) as handle:
            return [image async for image in handle.images()][-1]

    async def close(self) -> None:
        """Ends the engine; whoever still waits is told."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        _fail((*self._running, *self._waiting), RuntimeError("the engine was closed"))
        await asyncio.to_thread(self._thread.shutdown)
        if self._turns is not None:
            self._turns.close()

    async def _run(self) -> None:
        while True:
            self._drop_unwanted()
            if not self._running and not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            started = time.monotonic()
            outcome = await self._in_turn()
            for handle, error in outcome.failed:
                _fail((handle,), error)
            for handle, preview, pixels in outcome.due:
                handle.deliver(pixels, preview)
            gone = {handle for handle, _ in outcome.failed}
            self._running = [handle for handle in self._running if handle.steps_left and handle not in gone]
            if outcome.stepped:
                self._account(len(outcome.stepped), time.monotonic() - started)

    async def _in_turn(self) -> _Outcome:
        """One cycle of all who have a place when its turn has come: those too that came while it was others' turn."""
        loop = asyncio.get_running_loop()
        if self._turns is None:
            return await loop.run_in_executor(self._thread, self._cycle, self._seat())
        await loop.run_in_executor(self._thread, self._turns.acquire, self._since() or time.monotonic())
        try:
            self._drop_unwanted()
            return await loop.run_in_executor(self._thread, self._cycle, self._seat())
        finally:
            self._turns.release(self._since())

    def _since(self) -> float | None:
        """From when the one waits that is furthest behind: since it came, less the steps that it was given."""
        handles = [each for each in (*self._running, *self._waiting) if each.steps_left and not each.unwanted]
        return min((each.arrived + self._step_s * each.steps_done for each in handles), default=None)

    def _seat(self) -> list[RequestHandle]:
        """Who takes part in the next step: those who run, and of those who wait as many as there are places."""
        closed = self._whole_requests and bool(self._running)
        while self._waiting and len(self._running) < self._max_batch_size and not closed:
            self._running.append(self._waiting.popleft())
        return list(self._running)

    def _cycle(self, handles: list[RequestHandle]) -> _Outcome:
        """One step of all who have a place."""
        outcome = _Outcome()
        try:
            outcome.failed = self._admit(handles)
            alive = [(handle, handle.sample) for handle in handles if handle.sample is not None]
            for handle, preview, image in self._step(alive) if alive else []:
                if isinstance(image, Exception):
                    outcome.failed.append((handle, image))
                else:
                    outcome.due.append((handle, preview, image))
            outcome.stepped = [handle for handle, _ in alive]
        except Exception as fault:  # what shared this step is lost (out of memory, say), the engine is not
            outcome.failed = [(handle, fault) for handle in handles]
        return outcome

    def _admit(self, handles: list[RequestHandle]) -> list[tuple[RequestHandle, Exception]]:
        """Starts the newcomers; those that cannot be started, and why."""
        now = time.monotonic()
        newcomers = [handle for handle in handles if handle.sample is None]
        samples = self._denoiser.admit([handle.spec for handle in newcomers]) if newcomers else []
        failed: list[tuple[RequestHandle, Exception]] = []
        for handle, sample in zip(newcomers, samples, strict=True):
            if isinstance(sample, Exception):
                failed.append((handle, sample))
            else:
                handle.sample, handle.started = sample, now
        return failed

    def _step(
        self, alive: list[tuple[RequestHandle, Sample]]
    ) -> list[tuple[RequestHandle, int | None, Tensor | NotFiniteError]]:
        """One step for all; the pixels of those that are finished or due for a preview."""
        started = time.monotonic()
        self._denoiser.step([sample for _, sample in alive])
        self._step_s = min(self._step_s or math.inf, time.monotonic() - started)
        due = []
        for handle, sample in alive:
            preview = sample.take_preview()
            if preview is not None or not sample.steps_left:
                due.append((handle, sample, preview))
        pixels = self._denoiser.decode([sample for _, sample, _ in due])
        return [(handle, preview, image) for (handle, _, preview), image in zip(due, pixels, strict=True)]

    def _account(self, batch_size: int, seconds: float) -> None:
        self.cycle_s += (_SMOOTHING if self.cycle_s else 1.0) * (seconds - self.cycle_s)
        if self._observe is not None:
            self._observe(Cycle(batch_size, len(self._waiting), seconds))

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        self._running = [handle for handle in self._running if not handle.unwanted]
        late = [handle for handle in self._waiting if not handle.unwanted and handle.expires <= now]
        if late or any(handle.unwanted for handle in self._waiting):
            self._waiting = deque(each for each in self._waiting if not each.unwanted and each.expires > now)
        _fail(late, TooLateError("the request waited until its time was over"))


def _fail(handles: Iterable[RequestHandle], error: Exception) -> None:
    for handle in handles:
        handle.outbox.put_nowait(error)
