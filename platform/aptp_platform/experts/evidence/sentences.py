"""What figures and tables show, in words that are computed from the same numbers: they hold whoever wins."""

from collections.abc import Mapping, Sequence
from typing import Any

from aptp_platform.experts.evidence.arms import ORACLE, RANDOM, ROUTED
from aptp_platform.experts.evidence.figures import label
from aptp_platform.experts.evidence.scores import RunScores

Facts = Mapping[str, Any]


def verdict(budget: str, facts: Facts) -> str:
    """The routed experts beside the strongest opponent at one budget, other than random routing."""
    routed, minus = facts["arms"][ROUTED], facts["routed_minus"]
    start = f"At {budget} of the multiply-adds routed experts lose {_value(routed)}"
    others = [name for name in minus if name not in (ORACLE, RANDOM)]
    if not others:
        return f"{start}; they have no opponent at this budget."
    best = min(others, key=lambda name: float(facts["arms"][name]["extra_loss"]))
    low, high = minus[best]["95"]
    sure = "surely less" if high < 0 else "surely more" if low > 0 else "not surely more or less"
    ratio, interval = minus[best]["ratio"], minus[best]["ratio_95"]
    times = "" if ratio is None else f": {ratio:.2f} times as much"
    if interval is not None:
        times += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    against = f"the strongest opponent, {label(best)}, loses {_value(facts['arms'][best])}"
    return f"{start}; {against}. Routed experts lose {sure}{times}."


def _value(facts: Facts) -> str:
    low, high = facts["extra_loss_95"]
    return f"{facts['extra_loss']:.4f} [{low:.4f}, {high:.4f}]"


def arms_sentence(minus: Mapping[str, Facts]) -> str:
    """Whom the routed experts surely beat, who surely beats them, and what is open."""
    groups: dict[str, list[str]] = {}
    for name, facts in minus.items():
        low, high = facts["95"]
        word = "less than" if high < 0 else "more than" if low > 0 else "not surely more or less than"
        groups.setdefault(word, []).append(name)
    parts = [f"{word} {_listed(names)}" for word, names in groups.items()]
    return f"Extra loss of every arm, and the routed experts' minus it: they lose {'; '.join(parts)}."


def quality_sentence(budgets: Mapping[str, Facts]) -> str:
    """At how many budgets the routed experts are surely better, or worse, than each other arm."""
    groups: dict[tuple[int, int, int], list[str]] = {}
    for name in dict.fromkeys(name for facts in budgets.values() for name in facts["routed_minus"]):
        here = [facts["routed_minus"][name]["95"] for facts in budgets.values() if name in facts["routed_minus"]]
        key = (len(here), sum(high < 0 for _, high in here), sum(low > 0 for low, _ in here))
        groups.setdefault(key, []).append(name)
    parts = [
        f"beside {_listed(names)} surely less at {below} and surely more at {above} of {total}"
        for (total, below, above), names in groups.items()
    ]
    return f"Lower is better. Routed experts lose, by the number of budgets: {'; '.join(parts)}."


def curves_sentence(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Where each arm's training ended, and whether it still fell."""
    told = []
    for name, points in curves.items():
        last = points[-1]
        words = f"{label(name)} ends at {last['extra_loss']:.4f} after {last['step']:,.0f} steps"
        if len(points) > 1:
            change = last["extra_loss"] / points[-2]["extra_loss"] - 1
            words += f" ({change:+.0%} since step {points[-2]['step']:,.0f})"
        told.append(words)
    return f"Extra loss over the full model along the training: {'; '.join(told)}."


def need_sentence(facts: Facts) -> str:
    """What the figure of need and capacity shows."""
    if facts["spearman"] is None:
        return "All prompts are given the same capacity, or need the same: there is no rank correlation."
    low, high = facts["95"]
    follows = "follows" if low > 0 else "runs against" if high < 0 else "does not surely follow"
    return (
        f"Capacity {follows} need: each point is a prompt, on the right a kind, and the rank correlation over prompts "
        f"is {facts['spearman']:.2f} (95 % interval {low:.2f} to {high:.2f})."
    )


def kinds_sentence(kinds: Mapping[str, Facts]) -> str:
    """The most and the least needy kind, and what they are given."""
    if len(kinds) < 2:
        return ""
    order = sorted(kinds, key=lambda kind: float(kinds[kind]["need"]))
    least, most = (f"{kind} needs {kinds[kind]['need']:.3f} and is given {kinds[kind]['cost_ratio']:.3f}" for kind in
                   (order[0], order[-1]))  # fmt: skip
    return f"Of the kinds, {most}; {least}."


def gap_sentence(gap: Facts) -> str:
    """How much of the way from random routing to the oracle the router goes."""
    whole, rest = gap["random_minus_oracle"], gap["routed_minus_oracle"]
    random, router = (f"{each['mean']:+.4f} [{each['95'][0]:+.4f}, {each['95'][1]:+.4f}]" for each in (whole, rest))
    start = f"to the best expert per prompt at the same cost, random routing loses {random} and the router {router}"
    if gap["closed"] is None or whole["95"][0] <= 0:
        return f"{start}; that there is a gap to close is not sure."
    ends = "" if gap["closed_95"] is None else f" [{gap['closed_95'][0]:.0%}, {gap['closed_95'][1]:.0%}]"
    return f"{start}: it closes {gap['closed']:.0%}{ends} of that gap."


def cost_sentence(scores: RunScores, drawn: int) -> str:
    """What the columns of `arms_table` mean."""
    return (
        "Cost is the mean share of the full model's multiply-adds over these prompts. Distance is the mean squared "
        "difference from the full model's predictions. Image scores compare "
        f"{drawn} generated images with the real ones; lower is better but for the CLIP score. ms is the median time "
        f"of a forward pass of {scores.batch_size} latents on this {scores.device.upper()}, weighted by use."
    )


def kept_sentence(scores: RunScores) -> str:
    """What the figure of kept blocks shows."""
    costs = [expert.cost for expert in scores.experts]
    spread = f"from {min(costs):.3f} to {max(costs):.3f}" if max(costs) - min(costs) > 5e-4 else f"{costs[0]:.3f} each"
    return (
        "The share of prunable channels that each code keeps, block by block. "
        f"The {count_of(costs, 'code')} cost {spread} of the full model."
    )


def count_of(things: Sequence[object], noun: str) -> str:
    """One seed, two seeds."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    words = [label(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
