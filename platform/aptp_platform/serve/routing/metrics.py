"""Prometheus metrics of a router replica; Ray's metrics agent exports them with the prefix `ray_`.

Models are labels; prompts and users never are.
"""

from typing import Any, Final

from ray.serve.metrics import Counter, Gauge, Histogram

from aptp_platform.serve.messages import Choice, ImageResult
from aptp_platform.serve.routing.drift import Drift

_SECONDS: Final = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]
_MARGINS: Final = [1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


def _keys(*names: str) -> Any:
    """Ray annotates `tag_keys` as a tuple of one."""
    return names


class RouterMetrics:
    """What a router replica counts."""

    def __init__(self) -> None:
        self._requests = Counter("aptp_requests_total", "Requests by outcome.", _keys("expert", "outcome"))
        self._routes = Counter("aptp_route_total", "Requests by code and reason.", _keys("code", "reason"))
        self._overflow = Counter(
            "aptp_overflow_total", "Requests whose code had no room, by stand-in.", _keys("from", "to")
        )
        self._margin = Histogram(
            "aptp_route_confidence", "Best score minus the second, in loss or similarity.", _MARGINS
        )
        self._latency = Histogram("aptp_request_latency_seconds", "By phase.", _SECONDS, _keys("expert", "phase"))
        self._macs = Counter("aptp_macs_total", "Multiply-adds of the UNet, guidance included.", ("expert",))
        self._drift = Gauge("aptp_route_drift", "Distance of the recent codes from the training shares, 0 to 1.")
        self._unknown = Gauge("aptp_unknown_prompt_rate", "Recent prompts unlike the training's; 0.01 there.")

    def routed(self, choice: Choice, drift: Drift) -> None:
        self._routes.inc(tags={"code": choice.routed, "reason": choice.reason})
        self._margin.observe(choice.margin)
        self._drift.set(drift.distance)
        self._unknown.set(drift.unknown_rate)
        if choice.reason == "overflow":
            self._overflow.inc(tags={"from": choice.routed, "to": choice.model})

    def made(self, choice: Choice, image: ImageResult, macs: float) -> None:
        """macs: of the image."""
        for phase, milliseconds in (("queue", image.queue_ms), ("denoise", image.denoise_ms)):
            self._latency.observe(milliseconds / 1e3, tags={"expert": choice.model, "phase": phase})
        self._macs.inc(macs, tags={"expert": choice.model})

    def ended(self, choice: Choice, outcome: str, seconds: float) -> None:
        """outcome: ok, refused, cancelled or failed."""
        self._requests.inc(tags={"expert": choice.model, "outcome": outcome})
        self._latency.observe(seconds, tags={"expert": choice.model, "phase": "e2e"})
