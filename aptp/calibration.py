"""After stage 1: the thresholds are moved until the prompts, as they are really routed, cost the budget."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from aptp.cost import CostTable
from aptp.relax import LOGIT_LIMIT
from aptp.router import Router, require_used
from aptp.transport import balanced_assignment


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_budget` found and did; ratios are usage-weighted, of the noise-free codes."""

    ratio_before: float
    ratio: float
    width_shift: float
    depth_shift: float
    usage: tuple[float, ...]


@torch.no_grad()
def calibrate_budget(
    router: Router,
    embeddings: Float[Tensor, "prompt dim"],
    table: CostTable,
    budget: float,
    *,
    tolerance: float = 0.01,
    balance: bool = False,
    allow_unused: bool = False,
) -> Calibration:
    """Moves the thresholds of all gates by one number until the prompts, as finally routed, cost the budget on average.

    The shift is added to every width logit of codes and predictor alike, which keeps each site's order of units; depth
    moves only if width alone cannot reach the budget. Routes are computed anew for every shift that is tried. With
    `balance` the router's bias becomes the transport's potentials on these prompts: each code then gets about its equal
    share at inference as in training. A code that nobody uses is an UnusedCodeError unless allowed, a budget out of
    reach ValueError.
    """
    if not table.minimum <= budget <= 1:
        raise ValueError(f"budget must lie in {table.minimum:.3f}..1 (what this space can reach), it is {budget}")

    def ratio_at(width: float, depth: float) -> float:
        router.shift.copy_(torch.tensor([width, depth]))
        if balance:
            router.bias.zero_()
            similarities = router.route_embeddings(embeddings).similarities
            router.bias.copy_(balanced_assignment(similarities, epsilon=0.005, iterations=300).potentials)
        usage = router.route_embeddings(embeddings).usage()
        return float((usage * table.ratio(router.harden(router.gates(router.codes)))).sum())

    def bracket(ratio_of: Callable[[float], float], low: float = -30.0) -> tuple[float, float]:
        high = 30.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if ratio_of(middle) < budget else (low, middle)
        return low, high

    width, depth = router.shift.tolist()
    before = ratio_at(width, depth)
    if abs(before / budget - 1) > tolerance / 10:
        if not ratio_at(-30.0, depth) <= budget <= ratio_at(30.0, depth):
            kept_longest = LOGIT_LIMIT + router.config.relaxation.offset  # its gate closes at a shift of minus this
            _, depth = bracket(lambda shift: ratio_at(shift, shift), low=0.5 - kept_longest)
        width = min(bracket(lambda shift: ratio_at(shift, depth)), key=lambda w: abs(ratio_at(w, depth) - budget))
    after = ratio_at(width, depth)
    if abs(after / budget - 1) > tolerance:
        raise ValueError(
            f"the routed prompts cost {after:.3f} of the full MACs, the nearest to budget {budget} that a shift of the "
            f"thresholds reaches (tolerance {tolerance:.0%}): train longer or choose another budget"
        )
    usage = router.route_embeddings(embeddings).usage()
    if not allow_unused:
        require_used(usage)
    return Calibration(before, after, width, depth, tuple(usage.tolist()))
