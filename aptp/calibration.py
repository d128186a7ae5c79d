"""A router is put on budget: the prompts, as they are really routed, cost it on average.

After stage 1 the thresholds of all gates are moved, or the price of size is (`calibrate_budget`). Once the experts are
cut their sizes stand, and only the price is moved (`set_price`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from aptp.cost import CostTable
from aptp.relax import LOGIT_LIMIT
from aptp.router import Router
from aptp.routes import Routes, code_usage, require_used
from aptp.transport import assign

_NEAR: Final = 0.5  # of a shift: a code's size changes by a few hundredths


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
    balance: float = 0.0,
    allow_unused: bool = False,
) -> Calibration:
    """Makes the prompts, as finally routed, cost the budget on average.

    The thresholds of all gates move by one number, if by little; else prompts pay another price, if that is enough: the
    larger codes become, the more prompts go to the small ones. Only then the thresholds move as far as it takes.

    The shift is added to every width logit of codes and predictor alike, which keeps each site's order of units; depth
    moves only if width alone cannot reach the budget. Routes are computed anew for every shift that is tried. The
    router's bias becomes the transport's potentials on these prompts, under the `balance` of training: inference then
    shares prompts out as training did.

    Raises:
        UnusedCodeError: no prompt is routed to a code, unless that is allowed.
        ValueError: the budget is out of reach.
    """
    if not table.minimum <= budget <= 1:
        raise ValueError(f"budget must lie in {table.minimum:.3f}..1 (what this space can reach), it is {budget}")
    router.route_embeddings(embeddings[:1])  # refuses what no router can route
    logits, codes = router(embeddings)
    losses = None if router.need is None else router.need(embeddings)

    def ratio_at(width: float, depth: float) -> float:
        router.shift.copy_(torch.tensor([width, depth]))
        router.costs.copy_(table.ratio(router.harden(router.code_gates(router.codes))))
        router.bias.zero_()
        routes = router.route_logits(logits, codes, losses)
        _share_out(router, routes, balance)
        usage = code_usage((routes.scores + router.bias).argmax(1), router.num_codes)
        return float((usage * router.costs).sum())

    def off(width: float, depth: float) -> bool:
        return abs(ratio_at(width, depth) / budget - 1) > tolerance

    width, depth = router.shift.tolist()
    before = ratio_at(width, depth)
    if abs(before / budget - 1) > tolerance / 10:
        trained = width
        width = _nearest(lambda shift: ratio_at(shift, depth) - budget, trained, trained - _NEAR, trained + _NEAR)
        if off(width, depth):
            ratio_at(trained, depth)
            if _priced(router, embeddings, budget, tolerance, balance):
                width = trained
            else:
                width = _nearest(lambda shift: ratio_at(shift, depth) - budget, trained)
        if off(width, depth):
            kept_longest = LOGIT_LIMIT + router.config.relaxation.offset  # its gate closes at a shift of minus this
            depth = _nearest(lambda shift: ratio_at(shift, shift) - budget, depth, low=0.5 - kept_longest)
            width = _nearest(lambda shift: ratio_at(shift, depth) - budget, depth)
    after = ratio_at(width, depth)
    if abs(after / budget - 1) > tolerance:
        raise ValueError(
            f"the routed prompts cost {after:.3f} of the full MACs, the nearest to budget {budget} that a shift of the "
            f"thresholds reaches (tolerance {tolerance:.0%}): train longer or choose another budget"
        )
    usage = router.route_embeddings(embeddings).usage()
    if not allow_unused:
        require_used(usage)
    width, depth = router.shift.tolist()
    return Calibration(before, after, width, depth, tuple(usage.tolist()))


def _priced(router: Router, embeddings: Tensor, budget: float, tolerance: float, balance: float) -> bool:
    """Whether another price alone meets the budget; it is set then, and sizes stay as they were trained."""
    if router.need is None or router.num_codes == 1:
        return False
    price = router.price.clone()
    try:
        set_price(router, embeddings, budget, tolerance=tolerance, balance=balance)
    except ValueError:
        router.price.copy_(price)
        return False
    return True


def _nearest(over: Callable[[float], float], start: float, low: float = -30.0, high: float = 30.0) -> float:
    """Where `over` changes its sign, the nearest such place to the start that steps of doubling size find.

    `over` rises on the whole, but not everywhere: prompts move to other codes as sizes change, and far from the start
    one code can cost the budget while the others are whole and take no prompts.
    """
    sign = over(start) > 0
    near, step = start, -0.02 if sign else 0.02
    far = min(max(near + step, low), high)
    while (over(far) > 0) == sign and low < far < high:
        near, step = far, 2 * step
        far = min(max(near + step, low), high)
    for _ in range(24):
        middle = (near + far) / 2
        near, far = (middle, far) if (over(middle) > 0) == sign else (near, middle)
    return min((near, far), key=lambda shift: abs(over(shift)))


@torch.no_grad()
def set_price(
    router: Router,
    embeddings: Float[Tensor, "prompt dim"],
    budget: float,
    *,
    tolerance: float = 0.01,
    balance: float = 0.0,
) -> Float[Tensor, " code"]:
    """Sets the price at which these prompts cost the budget on average; returns each code's share of them.

    Without `balance` no other use of the same codes at that cost loses less by prediction: every price is such an
    optimum, at a mean cost of its own. Of few prompts one alone can miss the tolerance; then half of one is allowed.

    Raises:
        ValueError: the router does not route by need, or no price gives the budget within the tolerance.
    """
    router.bias.zero_()
    free = router.route_embeddings(embeddings, price=0.0)
    assert free.losses is not None  # a router without losses has refused the price

    def cost_at(price: float) -> float:
        router.price.fill_(price)
        router.bias.zero_()
        scores = router.scores(free.similarities, free.losses)
        _share_out(router, replace(free, scores=scores), balance)
        return float(router.costs[(scores + router.bias).argmax(1)].mean())

    low, high = 0.0, float(free.losses.mean())
    dearest = cost_at(low)
    while dearest > budget and cost_at(high) > budget and high < 1e9:
        high *= 2
    cheapest = cost_at(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_at(middle) > budget else (low, middle)
    found = min((low, high), key=lambda price: abs(cost_at(price) - budget))
    one_prompt = float(router.costs.max() - router.costs.min()) / len(embeddings)
    tolerance = max(tolerance, one_prompt / 2 / budget)
    if abs(cost_at(found) / budget - 1) > tolerance:
        raise ValueError(
            f"no price makes these {len(embeddings)} prompts cost {budget} of the full MACs (tolerance "
            f"{tolerance:.0%}): they cost {dearest:.3f} at their best codes, {cheapest:.3f} at a price of {high:.3g}, "
            f"and {cost_at(found):.3f} is the nearest; choose a budget in that range or cut codes of other sizes"
        )
    return router.route_embeddings(embeddings).usage()


def _share_out(router: Router, routes: Routes, balance: float) -> None:
    """Sets the router's bias to the transport's potentials, in the units of the routes' scores."""
    if balance:
        unit = 1.0 if routes.losses is None else routes.losses.mean().clamp_min(1e-12)
        shared = assign(routes.scores / unit, epsilon=0.005, iterations=300, balance=balance)
        router.bias.copy_(unit * shared.potentials)
