"""The figures of reports."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aptp_platform.experts.evidence.arms import ORACLE, RANDOM, ROUTED, TEACHER

OURS: Final = "#1f5fb4"
MARKS: Final = {  # of an arm: the same colour and marker in every figure
    TEACHER: ("#999999", "*"), ROUTED: (OURS, "o"), RANDOM: ("#7fa8d9", "x"), ORACLE: ("#0b2e5c", "+"),
    "one_code": ("#c44536", "s"), "one_code_short": ("#e39a90", "s"), "similarity_routing": ("#7b4fa3", "D"),
    "uniform": ("#3a8f5c", "^"), "magnitude": ("#b8860b", "v"), "random": ("#4a4a4a", "<"),
    "block-removal": ("#2aa1a1", ">"),
}  # fmt: skip
OTHERS: Final = (("#8c6d46", "X"), ("#6b8e23", "p"), ("#a0522d", "h"), ("#708090", "d"))
WIDE: Final = 8  # ratio of largest to smallest loss from which they are drawn on a logarithmic axis

Facts = Mapping[str, Any]


def label(name: str) -> str:
    return {TEACHER: "full model", RANDOM: "random routing", "random": "random units"}.get(name, name.replace("_", " "))


def _colours(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    others = [name for name in names if name not in MARKS]
    return {**MARKS, **{name: OTHERS[place % len(OTHERS)] for place, name in enumerate(others)}}


def draw_arms(arms: Mapping[str, Facts], minus: Mapping[str, Facts]) -> Figure:
    """On the left each arm's extra loss, on the right the routed experts' minus it, with 95 % intervals."""
    names = [name for name in arms if name != TEACHER][::-1]
    figure = Figure(figsize=(11, 1.1 + 0.42 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = _colours(list(arms))
    for place, name in enumerate(names):
        colour, marker = colours[name]
        _point(left, place, arms[name]["extra_loss"], arms[name]["extra_loss_95"], colour, marker)
        if name in minus:
            _point(right, place, minus[name]["mean"], minus[name]["95"], colour, marker)
    right.axvline(0, color="#888888", linewidth=1)
    left.set_yticks(range(len(names)), [label(name) for name in names])
    left.set_ylim(-0.6, len(names) - 0.4)
    left.set_xlabel("extra denoising loss over the full model")
    right.set_xlabel("routed minus it (left of the line: routed experts lose less)")
    left.set_xlim(left=min(0.0, left.get_xlim()[0]))
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    return figure


def _point(axis: Axes, place: float, value: float, interval: Sequence[float], colour: str, marker: str) -> None:
    low, high = interval
    reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axis.errorbar(value, place, xerr=reach, fmt=marker, color=colour, capsize=4, markersize=6)


def draw_quality_against_cost(budgets: Mapping[str, Facts]) -> Figure:
    """Extra loss of every arm over the budgets."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axis = figure.subplots()
    names = [name for name in next(iter(budgets.values()))["arms"] if name != TEACHER]
    names += sorted({name for facts in budgets.values() for name in facts["arms"]} - set(names) - {TEACHER})
    colours, values = _colours(names), []
    for place, name in enumerate(names):
        here = [facts["arms"][name] for facts in budgets.values() if name in facts["arms"]]
        colour, marker = colours[name]
        y = np.array([facts["extra_loss"] for facts in here])
        ends = np.array([facts["extra_loss_95"] for facts in here])
        x = np.array([facts["cost_ratio"] for facts in here]) + 0.0012 * (place - len(names) / 2)
        reach = np.maximum(0, [y - ends[:, 0], ends[:, 1] - y])
        width, style = (2.4, "-") if name == ROUTED else (1.2, "--" if name in (RANDOM, ORACLE) else "-")
        axis.errorbar(
            x, y, yerr=reach, fmt=marker, color=colour, label=label(name), capsize=3, linewidth=width, linestyle=style
        )
        values += list(y)
    if min(values) > 0 and max(values) > WIDE * min(values):
        axis.set_yscale("log")
    axis.set(
        xlabel="cost: mean share of the full model's multiply-adds", ylabel="extra denoising loss (95 % intervals)"
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def draw_need(
    need: Float[np.ndarray, " row"],
    capacity: Float[np.ndarray, " row"],
    by_kind: Mapping[str, Facts],
    codes: np.ndarray | None = None,
) -> Figure:
    """Need against capacity: on the left of every prompt (by code, if codes are given), on the right of every kind."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    prompts, kinds = figure.subplots(1, 2)
    jitter = np.random.default_rng(0).normal(0, 0.0015, len(need))
    colours: dict[str, Any] = {"color": OURS} if codes is None else {"c": codes, "cmap": "tab10"}
    prompts.scatter(need, capacity + jitter, s=12, alpha=0.5, linewidths=0, **colours)
    prompts.set(xlabel="need: mean extra loss under all experts", ylabel="cost given, share of all multiply-adds")
    table = sorted(by_kind.items(), key=lambda item: float(item[1]["need"]))
    x, y = ([facts[name] for _, facts in table] for name in ("need", "cost_ratio"))
    kinds.scatter(x, y, color=OURS, s=[4 + facts["rows"] for _, facts in table], alpha=0.7)
    for kind, facts in table:
        kinds.annotate(
            kind, (facts["need"], facts["cost_ratio"]), xytext=(6, 4), textcoords="offset points", fontsize=9
        )
    kinds.margins(x=0.2, y=0.12)
    kinds.set(xlabel="mean need of the kind", ylabel="mean cost given")
    for axis in (prompts, kinds):
        axis.grid(alpha=0.3)
    return figure


def draw_curves(curves: Mapping[str, Sequence[Facts]]) -> Figure:
    """Extra loss against training steps."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axis, colours = figure.subplots(), _colours(list(curves))
    for name, points in curves.items():
        colour, marker = colours[name]
        steps, lost = [point["step"] for point in points], [point["extra_loss"] for point in points]
        axis.plot(steps, lost, marker=marker, color=colour, label=label(name), linewidth=2.4 if name == ROUTED else 1.2)
    axis.set(xlabel="training steps of all networks of the arm together", ylabel="extra denoising loss")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def draw_milliseconds(budgets: Mapping[str, Facts], skipped: Sequence[str] = (TEACHER, RANDOM, ORACLE)) -> Figure:
    """Measured time against multiply-adds, both as shares of the full model's."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(name for facts in budgets.values() for name in facts["arms"] if name not in skipped))
    colours, highest = _colours(names), 0.0
    for name in names:
        here = [facts["arms"] for facts in budgets.values() if name in facts["arms"]]
        x = [arms[name]["cost_ratio"] for arms in here]
        y = [arms[name]["ms"] / arms[TEACHER]["ms"] for arms in here]
        axis.scatter(x, y, color=colours[name][0], marker=colours[name][1], label=label(name), s=45, alpha=0.8)
        highest = max(highest, *x, *y)
    axis.plot([0, 1], [0, 1], color="#888888", linewidth=1, label="time in proportion to cost")
    axis.set(xlim=(0, min(1.0, 1.25 * highest)), ylim=(0, 1.15 * highest))
    axis.set(xlabel="cost: share of the full model's multiply-adds", ylabel="share of the full model's milliseconds")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
