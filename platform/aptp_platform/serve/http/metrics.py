"""Prometheus metrics of an ingress replica; Ray's metrics agent exports them with the prefix `ray_`."""

from ray.serve.metrics import Counter


class IngressMetrics:
    """What an ingress replica counts."""

    def __init__(self) -> None:
        self._refused = Counter("aptp_refused_total", "Answers that are an error, by its code.", ("code",))

    def refused(self, code: str) -> None:
        self._refused.inc(tags={"code": code})
