"""The report of an evaluation: metrics.json, figures with a sentence each, and one page with all of them."""

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aptp.analysis import draw_kept_blocks, words_by_code
from aptp.codes import ArchitectureCode
from aptp_platform.experts.arms import ORACLE, RANDOM, ROUTED, TEACHER
from aptp_platform.run.layout import EVALUATED
from aptp_platform.storage.store import Store

SHOWN: Final = 24  # prompts with a picture of each arm
HARDEST: Final = 8
WORDS: Final = 8  # of each code
MEANING: Final = {
    TEACHER: "the full model",
    ROUTED: "each prompt by the expert that the router gives it",
    RANDOM: "the same experts and shares, prompts assigned at random",
    ORACLE: "each prompt by its best expert at the same cost, chosen at other noise",
}
STYLE: Final = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}figure{margin:0}img.figure{max-width:100%}
table{border-collapse:collapse}
td,th{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
td.number{text-align:right;font-variant-numeric:tabular-nums}
.picture{width:128px;height:128px;image-rendering:pixelated;display:block}.small .picture{width:80px;height:80px}
.scroll{overflow-x:auto}.lead{font-size:1.1rem}.caption{color:#555;max-width:16rem}
"""


@dataclass(frozen=True)
class Evaluation:
    """The results, for the held-out prompts in their order.

    need: what the experts lose on a prompt on average. lost: what the routed expert loses on it. pictures: of the first
    prompts, by arm.
    """

    metrics: Mapping[str, Any]
    captions: Sequence[str]
    kinds: Sequence[str]
    codes: Int[np.ndarray, " row"]
    costs: Float[np.ndarray, " code"]
    need: Float[np.ndarray, " row"]
    lost: Float[np.ndarray, " row"]
    pictures: Mapping[str, Sequence[bytes]]
    architectures: Sequence[ArchitectureCode]


def write_report(store: Store, found: Evaluation) -> None:
    """Publish the report as `evaluated/` in `store`, metrics.json last."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        figures = {
            "arms.png": _draw_arms(found.metrics["arms"]),
            "need.png": _draw_need(found),
            "kept.png": draw_kept_blocks(found.architectures, [float(cost) for cost in found.costs]),
        }
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
        (folder / "report.html").write_text(_page(folder, found))
        (folder / "metrics.json").write_text(json.dumps(found.metrics, indent=2) + "\n")
        store.publish(folder, EVALUATED, last=["metrics.json"])


def _draw_arms(arms: Mapping[str, Any]) -> Figure:
    names = [name for name in arms if name != TEACHER]
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.45 * len(names)), layout="constrained")
    for place, name in enumerate(reversed(names)):
        extra, (low, high) = arms[name]["extra_loss"], arms[name]["extra_loss_95"]
        reach = [[max(0, extra - low)], [max(0, high - extra)]]
        axis.errorbar(extra, place, xerr=reach, fmt="o", color="#2f6db5" if name == ROUTED else "#888888", capsize=4)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in reversed(names)])
    axis.set_xlabel("extra denoising loss over the full model, 95 % interval (left is better)")
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.grid(axis="x", alpha=0.3)
    return figure


def _draw_need(found: Evaluation) -> Figure:
    figure, (prompts, kinds) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    jitter = np.random.default_rng(0).normal(0, 0.002, len(found.need))
    prompts.scatter(found.need, found.costs[found.codes] + jitter, s=9, alpha=0.5, c=found.codes, cmap="tab10")
    prompts.set(xlabel="need: mean extra loss under all experts", ylabel="cost of its expert, share of all MACs")
    table = sorted(found.metrics["kinds"].items(), key=lambda item: float(item[1]["need"]))
    kinds.scatter([facts["need"] for _, facts in table], [facts["cost_ratio"] for _, facts in table], color="#2f6db5")
    for kind, facts in table:
        place = (facts["need"], facts["cost_ratio"])
        kinds.annotate(kind, place, xytext=(4, 3), textcoords="offset points", fontsize=9)
    kinds.set(xlabel="mean need of the kind", ylabel="mean cost that it is given")
    for axis in (prompts, kinds):
        axis.grid(alpha=0.3)
    return figure


def _page(folder: Path, found: Evaluation) -> str:
    metrics = found.metrics
    sections = [
        f"<h1>What the experts are worth: {metrics['held_out']} held-out captioned images</h1>",
        f"<p class=lead>{_verdict(metrics)}</p>",
        "<h2>All arms at one cost</h2>",
        _figure(folder / "arms.png", "What each arm loses to the full model on the same prompts, noise and timesteps."),
        _arms_table(metrics),
        "<h2>Does capacity follow need?</h2>",
        _figure(folder / "need.png", _need_sentence(metrics)),
        "<h2>The experts</h2>",
        _codes_table(found),
        _figure(folder / "kept.png", "The share of prunable channels that each expert keeps, block by block."),
        "<h2>The prompts that lose most</h2>",
        _hardest_table(found),
        "<h2>Same prompts, same seeds</h2>",
        _pictures_table(found),
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>APTP evaluation</title><style>{STYLE}</style>"
    return head + "\n".join(sections)


def _verdict(metrics: Mapping[str, Any]) -> str:
    arms = metrics["arms"]
    routed = arms[ROUTED]
    words = [
        f"At {routed['cost_ratio']:.2f} of the full model's multiply-adds, routed experts lose "
        f"{routed['extra_loss']:.4f} to the full model."
    ]
    for name, difference in metrics["routed_minus"].items():
        low, high = difference["95"]
        word = "less than" if high < 0 else "more than" if low > 0 else "no differently from"
        words.append(f"That is {word} {escape(name.replace('_', ' '))} ({arms[name]['extra_loss']:.4f}).")
    return " ".join(words)


def _need_sentence(metrics: Mapping[str, Any]) -> str:
    facts = metrics["need_capacity"]
    if facts["spearman"] is None:
        sentence = "All prompts are given the same capacity, or need the same: there is no rank correlation."
    else:
        low, high = facts["95"]
        sentence = (
            "Each point is a prompt, on the right a kind. Rank correlation of need and capacity over prompts: "
            f"{facts['spearman']:.2f} (95 % interval {low:.2f} to {high:.2f})."
        )
    if "predicted" in facts:
        told = facts["predicted"]
        rank = "" if told["spearman"] is None else f", with a rank correlation of {told['spearman']:.2f} over prompts"
        sentence += (
            f" The router predicts each prompt's loss under each expert with a mean absolute error of "
            f"{told['mean_absolute_error']:.3f}{rank}."
        )
    return sentence


def _arms_table(metrics: Mapping[str, Any]) -> str:
    rows = []
    for name, facts in metrics["arms"].items():
        minus = metrics["routed_minus"].get(name)
        cells = [
            f"{facts['cost_ratio']:.3f}",
            _with_interval(facts.get("extra_loss"), facts.get("extra_loss_95"), "{:.4f}"),
            "" if minus is None else _with_interval(minus["mean"], minus["95"], "{:+.4f}"),
            *("" if facts.get(score) is None else f"{facts[score]:.3f}" for score in ("cmmd_lite0", "fd_lite0")),
        ]
        meaning = MEANING.get(name, "one network for all prompts")
        numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
        name = escape(name.replace("_", " "))
        rows.append(f"<tr><td>{name}</td>{numbers}<td class=caption>{escape(meaning)}</td></tr>")
    heads = ("arm", "cost", "extra loss [95 %]", "routed minus it [95 %]", "CMMD-lite0", "FD-lite0", "")
    too_few = metrics["arms"][TEACHER].get("fd_lite0") is None
    return (
        f"<div class=scroll><table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"
        f"{''.join(rows)}</table></div>"
        f"<p>Cost is the mean share of the full model's multiply-adds over these prompts. CMMD-lite0 compares "
        f"{metrics['generated']} generated images with the real ones; lower is better."
        f"{' FD-lite0 needs 512 generated images and as many real ones.' if too_few else ''}</p>"
    )


def _with_interval(value: float | None, interval: tuple[float, float] | None, form: str) -> str:
    if value is None or interval is None:
        return ""
    return f"{form.format(value)} [{', '.join(form.format(end) for end in interval)}]"


def _codes_table(found: Evaluation) -> str:
    count = len(found.costs)
    words = words_by_code(list(found.captions), torch.from_numpy(found.codes), count, top=WORDS)
    rows = []
    for code, facts in enumerate(found.metrics["codes"]):
        mine = [row for row in range(len(found.pictures[ROUTED])) if found.codes[row] == code][:5]
        shown = "".join(f"<td>{_picture(found.pictures[ROUTED][row], found.captions[row])}</td>" for row in mine)
        typical = ", ".join(word for word, _ in words[code]) or "no prompt here"
        rows.append(
            f"<tr><td>{code:02d}</td><td class=number>{facts['cost_ratio']:.3f}</td>"
            f"<td class=number>{100 * facts['share']:.0f} %</td><td class=caption>{escape(typical)}</td>"
            f"<td><table class=small><tr>{shown}</tr></table></td></tr>"
        )
    return (
        "<div class=scroll><table>"
        "<tr><th>expert<th>cost<th>share of prompts<th>most typical words<th>what it draws</tr>"
        f"{''.join(rows)}</table></div>"
    )


def _hardest_table(found: Evaluation) -> str:
    rows = []
    for row in np.argsort(-found.lost, kind="stable")[:HARDEST]:
        shown = [pictures[row] for name in (TEACHER, ROUTED) if row < len(pictures := found.pictures[name])]
        cells = "".join(f"<td>{_picture(picture, found.captions[row])}</td>" for picture in shown)
        rows.append(
            f"<tr><td class=caption>{escape(found.captions[row])}</td><td class=number>{found.lost[row]:.4f}</td>"
            f"<td class=number>{found.costs[found.codes[row]]:.3f}</td>{cells}</tr>"
        )
    return (
        "<p>Extra loss of the routed expert, what it costs, and where a picture was drawn: full model, then expert.</p>"
        f"<table><tr><th>prompt<th>extra loss<th>cost</tr>{''.join(rows)}</table>"
    )


def _pictures_table(found: Evaluation) -> str:
    heads = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in found.pictures)
    rows = []
    for row in range(min([SHOWN, *map(len, found.pictures.values())])):
        cells = "".join(
            f"<td>{_picture(pictures[row], found.captions[row])}</td>" for pictures in found.pictures.values()
        )
        expert = f"expert {found.codes[row]:02d}, cost {found.costs[found.codes[row]]:.2f}"
        rows.append(f"<tr><td class=caption>{escape(found.captions[row])}<br>{expert}</td>{cells}</tr>")
    return f"<div class=scroll><table><tr><th>prompt</th>{heads}</tr>{''.join(rows)}</table></div>"


def _figure(path: Path, sentence: str) -> str:
    picture = f'<img class=figure src="{_data(path.read_bytes())}" alt="">'
    return f"<figure>{picture}<figcaption>{escape(sentence)}</figcaption></figure>"


def _picture(data: bytes, caption: str) -> str:
    return f'<img class=picture src="{_data(data)}" alt="{escape(caption, quote=True)}">'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
