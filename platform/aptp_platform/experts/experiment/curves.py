"""The held-out extra loss of one run along all its training: what its trainings measured at their checkpoints, joined.

The experts train side by side: the run's loss at a share of their steps is the mean of theirs, by held-out rows, each
interpolated at that share of its own steps.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from aptp_platform.config import RunConfig
from aptp_platform.run.layout import CURVES, FINETUNED, SHARED, assigned_router, home, network_of, trained_steps

SHARES: Final = (0.25, 0.5, 0.75, 1.0)  # of the experts' steps

Curve = list[dict[str, float]]


def run_curve(config: RunConfig) -> Curve:
    """`step`, of all networks of the run together, and `extra_loss`; empty if the run's trainings were not measured."""
    shared = _points(config, "share", SHARED)
    tuned = home(config, "finetune")
    names = [network_of(code) for code in range(assigned_router(config).num_codes)]
    measured = {name: points for name in names if (points := _points(config, "finetune", FINETUNED, name))}
    if not measured:
        return []
    start, total = config.share.run.steps, sum(trained_steps(tuned, name) for name in names)
    rows = np.array([points[-1]["rows"] for points in measured.values()])
    joined = [{"step": point["step"], "extra_loss": point["extra_loss"]} for point in shared]
    for share in SHARES:
        losses = [
            np.interp(share * points[-1]["step"], *_columns(points)) if share < 1 else points[-1]["extra_loss"]
            for points in measured.values()
        ]
        joined.append({"step": start + share * total, "extra_loss": float(rows @ np.array(losses) / rows.sum())})
    return joined


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Of several seeds, at the steps that all have."""
    steps = sorted(set.intersection(*({point["step"] for point in curve} for curve in curves)))
    by_step = [{point["step"]: point["extra_loss"] for point in curve} for curve in curves]
    return [{"step": step, "extra_loss": float(np.mean([each[step] for each in by_step]))} for step in steps]


def _points(config: RunConfig, stage: str, folder: str, name: str | None = None) -> list[dict[str, Any]]:
    curves, file = home(config, stage).join(folder, CURVES), f"{name or stage}.json"
    return curves.read_json(file) if curves.exists(file) else []


def _columns(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["step"] for point in points], [point["extra_loss"] for point in points]
