"""The most that the cluster can provide: a job that needs more would wait for ever, so it is refused in one line."""

from collections.abc import Mapping
from math import floor

import ray

from aptp_platform.config import ConfigError


def require_room(
    where: str, count: str | None, number: int, shares: Mapping[str, tuple[str, float]], spare: float
) -> None:
    """ConfigError if the cluster can never hold `number` of something at once.

    Args:
        where: the config's section. count: the field in it that sets the number; None if no field does.
        shares: for each resource the field that sets what one of them takes, and its value.
        spare: CPUs for the tasks that feed them; without any they would wait for ever.
    """
    most = capacity()
    for resource, (field, share) in shares.items():
        beside = spare if resource == "CPU" else 0.0
        room = most.get(resource, 0.0)
        if not share or number * share + beside <= room:
            continue
        if count is None:
            raise ConfigError(
                f"{where}.{field}: {share:g}: the cluster has at most {room:g} {resource}: lower it, or add nodes"
            )
        fitting = floor(max(room - beside, 0.0) / share)
        fix = f"set {where}.{count} to at most {fitting}" if fitting else f"lower {where}.{field}"
        feeding = f" and {beside:g} for the tasks that feed them" if beside else ""
        raise ConfigError(
            f"{where}.{count}: {number}: with {where}.{field} {share:g} they need {number * share:g} {resource}"
            f"{feeding}, the cluster has at most {room:g}: {fix}, or add nodes"
        )


def capacity() -> dict[str, float]:
    """What the cluster has now, or may have after autoscaling."""
    most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    now: dict[str, float] = ray.cluster_resources()
    return {resource: max(now.get(resource, 0.0), most.get(resource, 0.0)) for resource in {*now, *most}}
