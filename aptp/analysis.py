"""What a router has learned, for a person: whose prompts a code gets, what it costs, what it keeps, what is hardest."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from aptp.codes import ArchitectureCode


@dataclass(frozen=True)
class GroupBudget:
    """One group of prompts: how many, their mean MACs ratio, and their share on each code."""

    count: int
    ratio: float
    usage: tuple[float, ...]


def words_by_code(
    prompts: Sequence[str], indices: Int[Tensor, " prompt"], num_codes: int, *, top: int = 8, prior: float = 100.0
) -> list[list[tuple[str, float]]]:
    """The words most typical of each code's prompts, with their z-scores, highest first.

    z is the log odds of a word in a code against the other codes, under a Dirichlet prior of `prior` words drawn like
    all prompts, over its standard error (Monroe, Colaresi and Quinn 2008, "Fightin' Words"): a word that occurs once
    does not beat one that occurs everywhere here and hardly elsewhere. A word counts once a prompt.
    """
    if len(prompts) != len(indices):
        raise ValueError(f"there must be one code a prompt: {len(prompts)} prompts, {len(indices)} codes")
    counts = [Counter[str]() for _ in range(num_codes)]
    for prompt, code in zip(prompts, indices.tolist(), strict=True):
        counts[code].update(set(re.findall(r"\w+", prompt.lower())))
    everywhere = sum(counts, Counter())
    total = everywhere.total()

    def score(word: str, code: int) -> float:
        pseudo = prior * everywhere[word] / total
        here, size = counts[code][word] + pseudo, counts[code].total() + prior
        there, rest = everywhere[word] - counts[code][word] + pseudo, total - counts[code].total() + prior
        odds = log(here / (size - here)) - log(there / (rest - there))
        return odds / (1 / here + 1 / there) ** 0.5

    return [
        sorted(((word, score(word, code)) for word in counts[code]), key=lambda scored: (-scored[1], scored[0]))[:top]
        for code in range(num_codes)
    ]


def budget_by_group(
    groups: Sequence[str], indices: Int[Tensor, " prompt"], ratios: Float[Tensor, " code"]
) -> dict[str, GroupBudget]:
    """What the prompts of each group (a kind, a style) are given by the routing, dearest group first."""
    if len(groups) != len(indices):
        raise ValueError(f"there must be one group a prompt: {len(groups)} groups, {len(indices)} routes")
    table = {}
    for group in set(groups):
        rows = indices[torch.tensor([name == group for name in groups], device=indices.device)]
        usage = torch.bincount(rows, minlength=len(ratios)) / len(rows)
        table[group] = GroupBudget(len(rows), float(ratios[rows].mean()), tuple(usage.tolist()))
    return dict(sorted(table.items(), key=lambda item: (-item[1].ratio, item[0])))


def hardest_prompts(
    prompts: Sequence[str],
    expert_loss: Float[Tensor, " prompt"],
    teacher_loss: Float[Tensor, " prompt"],
    count: int = 10,
) -> list[tuple[str, float]]:
    """The prompts that lose most by pruning: the largest difference of paired losses, which is not the largest loss."""
    if not len(prompts) == len(expert_loss) == len(teacher_loss):
        raise ValueError(f"there must be two losses a prompt: {len(prompts)}, {len(expert_loss)}, {len(teacher_loss)}")
    lost = (expert_loss - teacher_loss).cpu()
    order = lost.argsort(descending=True, stable=True)[:count].tolist()
    return [(prompts[i], float(lost[i])) for i in order]


def kept_by_block(code: ArchitectureCode) -> dict[str, float]:
    """Of each block of layers (down_blocks.0, mid_block, ...), in the network's order, the share of channels kept.

    Only channels inside prunable layers count; those of a dropped layer count as gone.
    """
    kept: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for site, owner in zip(code.space.width, code.space.owners, strict=True):
        match = re.match(r"\w+?blocks?\.\d+|\w+", site.name)
        assert match
        whole[match[0]] += site.channels
        if owner < 0 or not code.drops(code.space.depth[owner].name):
            kept[match[0]] += len(code.kept_units(site.name)) * site.channels_per_unit
    return {block: kept[block] / channels for block, channels in whole.items()}


def draw_kept_blocks(codes: Sequence[ArchitectureCode], ratios: Sequence[float]) -> Figure:
    """A figure of which blocks each code keeps: one row a code, one column a block, the share written in each cell."""
    if not codes or len(codes) != len(ratios):
        raise ValueError(f"there must be at least one code, each with its ratio: {len(codes)} and {len(ratios)}")
    tables = [kept_by_block(code) for code in codes]
    blocks = list(tables[0])
    shares = [[table[block] for block in blocks] for table in tables]
    figure = Figure(figsize=(1.5 + 0.9 * len(blocks), 1.2 + 0.45 * len(codes)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    short = [block.replace("_blocks.", " ").replace("_block", "").replace("transformer", "block") for block in blocks]
    axes.set_xticks(range(len(blocks)), short)
    axes.set_yticks(range(len(codes)), [f"code {i} ({ratio:.2f} of MACs)" for i, ratio in enumerate(ratios)])
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color="black" if share > 0.6 else "white")
    axes.set_title("share of prunable channels kept")
    return figure
