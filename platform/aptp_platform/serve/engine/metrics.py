"""Prometheus metrics of an expert replica; Ray's metrics agent exports them with the prefix `ray_`."""

from typing import Final

from ray.serve.metrics import Gauge, Histogram

from aptp_platform.serve.engine.batching import Cycle

_SECONDS: Final = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]
_BATCH_SIZES: Final = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class ExpertMetrics:
    """What an expert replica counts: an observer of its engine."""

    def __init__(self, model: str, batch_limit: int) -> None:
        self._tags, self._batch_limit = {"expert": model}, batch_limit
        self._limit = Gauge("aptp_batch_limit", "Samples that a replica denoises together at most.", ("expert",))
        self._batch = Histogram("aptp_batch_size", "Samples that shared a denoising step.", _BATCH_SIZES, ("expert",))
        self._step = Histogram("aptp_step_seconds", "Seconds of a denoising step.", _SECONDS, ("expert",))
        self._running = Gauge("aptp_num_requests_running", "Samples in the batch.", ("expert",))
        self._waiting = Gauge("aptp_num_requests_waiting", "Requests that wait to join it.", ("expert",))

    def observe(self, cycle: Cycle) -> None:
        self._batch.observe(cycle.batch_size, tags=self._tags)
        self._step.observe(cycle.seconds, tags=self._tags)
        self._limit.set(self._batch_limit, tags=self._tags)  # again: Ray drops a gauge that nobody sets any more
        self._running.set(cycle.batch_size, tags=self._tags)
        self._waiting.set(cycle.waiting, tags=self._tags)
