"""The tasks that score networks on held-out rows: whether the cluster holds one."""

from aptp_platform.config import EvaluateConfig
from aptp_platform.run.resources import require_room


def check_scoring(config: EvaluateConfig) -> None:
    """ConfigError if the cluster can never run the task that scores a network."""
    shares = {
        "CPU": ("cpus_per_network", config.cpus_per_network),
        "GPU": ("gpus_per_network", config.gpus_per_network),
    }
    require_room("evaluate", None, 1, shares, spare=0.0)
