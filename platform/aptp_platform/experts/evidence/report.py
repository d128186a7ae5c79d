"""The report of one run: metrics.json, the scores, figures with a sentence each, and one page with all of them."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from aptp_platform.experts.evidence import page
from aptp_platform.experts.evidence.arms import ORACLE, RANDOM, ROUTED, TEACHER, need_of
from aptp_platform.experts.evidence.figures import draw_arms, draw_need, label
from aptp_platform.experts.evidence.scores import RunScores
from aptp_platform.experts.evidence.sentences import cost_sentence, need_sentence
from aptp_platform.experts.evidence.tables import SHOWN, codes_table, hardest_rows, kept_figure, pictures_table
from aptp_platform.run.layout import EVALUATED
from aptp_platform.storage.store import Store

MEANING: Final = {
    TEACHER: "the network that was pruned",
    ROUTED: "each prompt by the expert that the router gives it",
    RANDOM: "the same experts and shares, prompts assigned at random",
    ORACLE: "each prompt by its best expert at the same cost, chosen at other noise",
    "one_code": "one network for all prompts, fine-tuned as long as all experts together",
    "one_code_short": "one network for all prompts, fine-tuned as long as one expert",
    "similarity_routing": "experts whose prompts are routed by similarity, as in the paper",
    "uniform": "one network for all prompts: every layer is cut by the same share",
    "magnitude": "one network for all prompts: the units with the smallest weights are cut",
    "random": "one network for all prompts: units are cut at random",
    "block-removal": "one network for all prompts: whole layers are cut",
}
IMAGE_SCORES: Final = {
    "fd_lite0": "FD-lite0", "cmmd_lite0": "CMMD-lite0", "fid": "FID", "cmmd": "CMMD", "clip_score": "CLIP score",
}  # fmt: skip


def write_report(store: Store, metrics: Mapping[str, Any], scores: RunScores) -> None:
    """Publish the report as `evaluated/` in `store`, metrics.json last."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        title = f"What the experts are worth: {metrics['held_out']} held-out captioned images"
        page.write_page(folder / "report.html", title, _sections(folder, metrics, scores))
        scores.save(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        store.publish(folder, EVALUATED, last=["metrics.json"])


def _sections(folder: Path, metrics: Mapping[str, Any], scores: RunScores) -> list[str]:
    arms, routed = metrics["arms"], scores.routed()
    lost = routed.losses - scores.teacher.losses[0]
    drawn = metrics["generated"]
    need = draw_need(need_of(scores.teacher, scores.experts), routed.costs, metrics["kinds"], scores.codes)
    sections = [
        page.paragraph(_verdict(metrics), "lead"),
        page.heading("All arms at one cost"),
        page.figure(
            draw_arms(arms, metrics["routed_minus"]),
            "What each arm loses to the full model on the same prompts, noise and timesteps.",
            folder / "arms.png",
        ),
        arms_table(arms, metrics["routed_minus"]),
        page.bullets(meanings(arms)),
        page.paragraph(cost_sentence(scores, drawn)),
        page.heading("Does capacity follow need?"),
        page.figure(need, f"{need_sentence(metrics['need_capacity'])} {_predicted(metrics)}", folder / "need.png"),
        page.heading("The experts"),
        codes_table(scores),
        page.figure(
            kept_figure(scores),
            "The share of prunable channels that each expert keeps, block by block.",
            folder / "kept.png",
        ),
        page.heading("The prompts that lose most"),
        pictures_table(scores, hardest_rows(lost, drawn), scores.pictures, lost),
    ]
    if drawn:
        rows = range(min(SHOWN, drawn))
        sections += [page.heading("Same prompts, same seeds"), pictures_table(scores, rows, scores.pictures, lost)]
    return sections


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
        words.append(f"That is {word} {label(name)} ({arms[name]['extra_loss']:.4f}).")
    return " ".join(words)


def _predicted(metrics: Mapping[str, Any]) -> str:
    told = metrics["need_capacity"].get("predicted")
    if told is None:
        return ""
    rank = "" if told["spearman"] is None else f", with a rank correlation of {told['spearman']:.2f} over prompts"
    error = told["mean_absolute_error"]
    return f"The router predicts each prompt's loss under each expert with a mean absolute error of {error:.3f}{rank}."


def meanings(arms: Iterable[str]) -> list[str]:
    """What each arm is."""
    return [f"{label(name)}: {MEANING.get(name, 'trained as a run of its own')}" for name in arms]


def arms_table(arms: Mapping[str, Any], minus: Mapping[str, Any]) -> str:
    """Every arm in numbers; image scores, steps and ratios that no arm has are left out."""
    shown = [score for score in IMAGE_SCORES if any(facts.get(score) is not None for facts in arms.values())]
    ratios, steps = (any(name in facts for facts in (*minus.values(), *arms.values())) for name in ("ratio", "steps"))
    rows = []
    for name, facts in arms.items():
        beside = minus.get(name, {})
        rows.append(
            [
                page.text(label(name)),
                page.number(facts["cost_ratio"]),
                page.number(facts.get("extra_loss"), "{:.4f}", facts.get("extra_loss_95")),
                page.number(beside.get("mean"), "{:+.4f}", beside.get("95")),
                *([page.number(beside.get("ratio"), "{:.2f}", beside.get("ratio_95"))] if ratios else []),
                page.number(facts["teacher_distance"], "{:.4f}"),
                *(page.number(facts.get(score)) for score in shown),
                page.number(facts["ms"], "{:.3g}"),
                *([page.number(facts["steps"], "{:,}")] if steps else []),
            ]
        )
    heads = ["arm", "cost", "extra loss [95 %]", "routed minus it [95 %]", *(["routed / it [95 %]"] if ratios else [])]
    heads += ["distance", *(IMAGE_SCORES[score] for score in shown), "ms", *(["steps"] if steps else [])]
    return page.table(heads, rows)
