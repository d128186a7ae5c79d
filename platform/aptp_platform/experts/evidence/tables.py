"""What a run did with single prompts: tables of words, pictures and captions."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from aptp.analysis import draw_kept_blocks, words_by_code
from aptp_platform.experts.evidence import page
from aptp_platform.experts.evidence.arms import ROUTED
from aptp_platform.experts.evidence.figures import label
from aptp_platform.experts.evidence.scores import RunScores

SHOWN: Final = 16  # prompts with a picture of each arm
HARDEST: Final = 8
WORDS: Final = 8  # of each code
EXAMPLES: Final = 5  # pictures of each code


def codes_table(scores: RunScores) -> str:
    """Of each code: cost, use, typical words and what it draws."""
    count = len(scores.experts)
    words = words_by_code(scores.captions, torch.from_numpy(scores.codes), count, top=WORDS)
    drawn = scores.pictures.get(ROUTED, [])
    rows = []
    for code, expert in enumerate(scores.experts):
        mine = [row for row in range(len(drawn)) if scores.codes[row] == code][:EXAMPLES]
        rows.append(
            [
                page.text(f"{code:02d}"),
                page.number(expert.cost),
                page.number(100 * float((scores.codes == code).mean()), "{:.0f} %"),
                page.text(", ".join(word for word, _ in words[code]) or "no prompt here"),
                page.pictures((drawn[row] for row in mine), (scores.captions[row] for row in mine)),
            ]
        )
    return page.table(("code", "cost", "share of prompts", "most typical words", "what it draws"), rows)


def kept_figure(scores: RunScores) -> Figure:
    return draw_kept_blocks(scores.architectures, [expert.cost for expert in scores.experts])


def hardest_rows(lost: Float[np.ndarray, " row"], drawn: int) -> list[int]:
    """The rows that lose most, of those that were drawn if any were."""
    return [int(row) for row in np.argsort(-lost[: drawn or None], kind="stable")[:HARDEST]]


def pictures_table(
    scores: RunScores, rows: Sequence[int], columns: Mapping[str, Sequence[bytes]], lost: Float[np.ndarray, " row"]
) -> str:
    """Of each row the caption, what it was given and lost, and a picture of every arm."""
    cells = []
    for row in rows:
        code = int(scores.codes[row])
        given = f"code {code:02d}, cost {scores.experts[code].cost:.2f}, extra loss {lost[row]:.4f}"
        shown = [
            page.shown(pictures[row] if row < len(pictures) else None, f"{label(name)}: {scores.captions[row]}")
            for name, pictures in columns.items()
        ]
        cells.append([page.text(scores.captions[row], given), *shown])
    return page.table(("prompt", *map(label, columns)), cells)
