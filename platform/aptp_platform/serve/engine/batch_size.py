"""How many samples a denoising step should carry: measured at a replica's start, on its network and its machine."""

from __future__ import annotations

import logging
import time
from typing import Final

from aptp_platform.serve.engine.denoising import Denoiser, Sample, SampleSpec

_NEARLY: Final = 0.9  # of the best rate: a larger batch than the first to reach it mostly adds latency
_GAIN: Final = 1.03  # of a doubled batch, below which doubling on is not worth its time
_REPEATS: Final = 3
_LOG = logging.getLogger("ray.serve")


def best_batch_size(denoiser: Denoiser, size: tuple[int, int], *, largest: int, seconds: float) -> int:
    """The smallest batch whose steps make nearly as many samples a second as those of any up to `largest`.

    Sizes double until a doubling gains nothing, memory is full or the time is over. Beyond saturation a larger batch
    only increases the mean latency.

    Args:
        size: (width, height) in pixels of what is measured.
        seconds: what the measurement may take; a step that was begun is finished.
    """
    ends = time.monotonic() + seconds
    rates: dict[int, float] = {}
    batch, before = 1, 0.0
    while batch <= largest:
        try:
            rates[batch] = batch / _step_s(denoiser, size, batch, ends)
        except RuntimeError as error:  # out of memory, on any device
            _LOG.warning("batches of %d do not run here: %s", batch, str(error)[:200])
            break
        if time.monotonic() >= ends or batch == largest or rates[batch] < _GAIN * before:
            break
        batch, before = min(2 * batch, largest), rates[batch]
    if not rates:
        raise RuntimeError("not even one sample could be denoised; the log says why")
    enough = _NEARLY * max(rates.values())
    return next(batch for batch, rate in rates.items() if rate >= enough)


def _step_s(denoiser: Denoiser, size: tuple[int, int], batch: int, ends: float) -> float:
    """Seconds of one step of guided samples: the least of a few, the first of a size being slow."""
    spec = SampleSpec("", seed=0, num_inference_steps=_REPEATS + 1, guidance_scale=2.0, size=size)
    samples = [sample for sample in denoiser.admit([spec] * batch) if isinstance(sample, Sample)]
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        denoiser.step(samples)
        samples[-1].latents.cpu()  # waits for the device
        times.append(time.perf_counter() - started)
        if time.monotonic() >= ends:
            break
    return min(times)
