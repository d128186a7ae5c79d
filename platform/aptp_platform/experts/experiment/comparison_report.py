"""The comparison as one page for people: report.html with its pictures in it, beside metrics.json and the figures.

Every figure has a sentence that says what it shows, computed from the same numbers, whoever wins.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from aptp_platform.experts.evidence import page
from aptp_platform.experts.evidence.arms import ORACLE, RANDOM, ROUTED, TEACHER, need_of
from aptp_platform.experts.evidence.features import NEEDED
from aptp_platform.experts.evidence.figures import (
    draw_arms,
    draw_curves,
    draw_milliseconds,
    draw_need,
    draw_quality_against_cost,
)
from aptp_platform.experts.evidence.report import arms_table, meanings
from aptp_platform.experts.evidence.sentences import (
    arms_sentence,
    cost_sentence,
    count_of,
    curves_sentence,
    gap_sentence,
    kept_sentence,
    kinds_sentence,
    need_sentence,
    quality_sentence,
    verdict,
)
from aptp_platform.experts.evidence.tables import SHOWN, codes_table, hardest_rows, kept_figure, pictures_table
from aptp_platform.experts.evidence.trials import ArmRun, Trial, gather
from aptp_platform.experts.experiment.comparison import budget_key

FEW_SEEDS: Final = 5
AGREEMENT: Final = {
    "kinds": "codes with kinds",
    "kmeans_kinds": "k-means with kinds",
    "template": "codes with first words",
    "kmeans_template": "k-means with first words",
}

Facts = Mapping[str, Any]


def write(
    folder: Path,
    found: Facts,
    runs: Sequence[ArmRun],
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> None:
    """Write report.html, metrics.json (`found`) and each figure as a PNG file into a local folder.

    Args:
        found: what `compare(runs)` returned. runs: the same runs, for prompts and pictures.
        curves: for some arms their points `{"step": ..., "extra_loss": ...}` along the training, at one budget.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = gather(runs)
    title = (
        f"Routed experts beside their opponents: {found['rows']} held-out prompts, {count_of(found['seeds'], 'seed')}"
    )
    sections = [*_summary(folder, found), *_by_budget(folder, found, trials)]
    if curves:
        sections += [
            page.heading("Along the training"),
            page.figure(draw_curves(curves), curves_sentence(curves), folder / "curves.png"),
        ]
    sections += [*_routing(found), *_time(folder, found), *_examples(folder, trials)]
    page.write_page(folder / "report.html", title, sections)
    (folder / "metrics.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")


def _summary(folder: Path, found: Facts) -> list[str]:
    budgets = found["budgets"]
    seeds = count_of(found["seeds"], "seed")
    note = f"Intervals are 95 %, by bootstrap over {seeds} and the prompts, the same for all arms."
    if len(found["seeds"]) == 1:
        note += " With one seed they do not cover what another training run would change."
    elif len(found["seeds"]) < FEW_SEEDS:
        note += f" With fewer than {FEW_SEEDS} seeds they are too narrow."
    return [
        page.bullets(verdict(budget, facts) for budget, facts in budgets.items()),
        page.paragraph(note),
        page.paragraph("The arms:"),
        page.bullets(meanings(dict.fromkeys(name for facts in budgets.values() for name in facts["arms"]))),
        page.heading("Quality against cost"),
        page.figure(draw_quality_against_cost(budgets), quality_sentence(budgets), folder / "budgets.png"),
    ]


def _by_budget(folder: Path, found: Facts, trials: Sequence[Trial]) -> list[str]:
    sections = []
    for budget, facts in found["budgets"].items():
        here = [trial for trial in trials if budget_key(trial.method.budget) == budget]
        need = np.mean([need_of(trial.method.teacher, trial.method.experts) for trial in here], axis=0)
        capacity = np.mean([trial.arms[ROUTED].costs for trial in here], axis=0)
        minus = facts["routed_minus"]
        sections += [
            page.heading(f"Budget {budget}"),
            page.figure(draw_arms(facts["arms"], minus), arms_sentence(minus), folder / f"arms-{budget}.png"),
            arms_table(facts["arms"], minus),
            page.heading(f"Does capacity follow need at {budget}?", level=3),
            page.figure(
                draw_need(need, capacity, facts["need_capacity"]["by_kind"]),
                f"{need_sentence(facts['need_capacity'])} {kinds_sentence(facts['need_capacity']['by_kind'])}",
                folder / f"need-{budget}.png",
            ),
        ]
    words = cost_sentence(trials[0].method, found["generated"])
    needed = NEEDED.get(found["extractor"], 0)
    if 0 < found["generated"] < needed:
        words += f" A Frechet distance needs {needed} generated images and as many real ones."
    return [*sections, page.paragraph(f"{words} Steps are of fine-tuning, of all networks of the arm together.")]


def _routing(found: Facts) -> list[str]:
    rows, closer = [], []
    for budget, facts in found["budgets"].items():
        told = facts["agreement"]
        rows.append([page.text(budget), *(page.number(told[name], "{:z.2f}") for name in AGREEMENT)])
        if told["template"] > told["kinds"]:
            closer.append(budget)
    where = f"At {', '.join(closer)}" if closer else "At no budget"
    return [
        page.heading("How good is the routing itself?"),
        page.bullets(f"At {budget}: {gap_sentence(facts['oracle_gap'])}" for budget, facts in found["budgets"].items()),
        page.heading("What do the codes follow?", level=3),
        page.table(("budget", *AGREEMENT.values()), rows),
        page.paragraph(
            "Adjusted mutual information: 1 for the same grouping of the prompts, 0 for chance. k-means makes as many "
            f"groups of the prompts' embeddings as there are codes. {where} {'' if closer else 'do '}the codes agree "
            "more with the captions' first word than with the kind of thing shown."
        ),
    ]


def _time(folder: Path, found: Facts) -> list[str]:
    told = []
    for budget, facts in found["budgets"].items():
        arms = facts["arms"]
        share = arms[ROUTED]["ms"] / arms[TEACHER]["ms"]
        told.append(f"at {budget} of the multiply-adds routed experts take {share:.2f} of the full model's time")
    first = next(iter(found["budgets"].values()))["arms"][TEACHER]["ms"]
    sentence = (
        f"Median time of a forward pass of {found['batch_size']} latents, measured on this {found['device'].upper()}, "
        f"where the full model takes {first:.0f} ms: {'; '.join(told)}."
    )
    return [
        page.heading("Measured time"),
        page.figure(draw_milliseconds(found["budgets"]), sentence, folder / "milliseconds.png"),
    ]


def _examples(folder: Path, trials: Sequence[Trial]) -> list[str]:
    """Prompts, words and pictures of one trial: the tightest budget's first seed."""
    trial = trials[0]
    method, drawn = trial.method, len(next(iter(trial.method.pictures.values()), ()))
    lost: Float[np.ndarray, " row"] = trial.arms[ROUTED].losses - trial.arms[TEACHER].losses
    which = f"budget {method.budget:g}, seed {method.seed}"
    columns = pictures_of(trial)
    rows = hardest_rows(lost, drawn)
    costs = trial.arms[ROUTED].costs
    among = f"the {drawn} prompts that were drawn" if drawn else "all prompts"
    sections = [
        page.heading(f"The prompts that lose most ({which})"),
        page.paragraph(
            f"Of {among}, those whose routed expert loses most to the full model; they cost "
            f"{costs[rows].mean():.3f} on average, all prompts {costs.mean():.3f}."
        ),
        pictures_table(method, rows, columns, lost),
        page.heading(f"The codes ({which})"),
        codes_table(method),
    ]
    if method.architectures:
        sections.append(page.figure(kept_figure(method), kept_sentence(method), folder / "kept.png"))
    if drawn:
        sections += [
            page.heading(f"Same prompts, same seeds of the noise ({which})"),
            pictures_table(method, range(min(SHOWN, drawn)), columns, lost),
        ]
    return sections


def pictures_of(trial: Trial) -> dict[str, Sequence[bytes]]:
    """The pictures of every arm that drew: the full model, the routed experts, then the opponents."""
    return {
        name: trial.pictures[name] for name in trial.arms if name not in (RANDOM, ORACLE) and trial.pictures.get(name)
    }
