"""The codes' sizes, which are their MACs ratios: where stage 1 holds them, and where need wants them.

Stage 1 holds the mean size at the budget and lets price and task say how codes share it. Once weights are trained,
codes move to where one more unit of cost saves every code's prompts what the router pays for it:

    s_k <- s_k + rate / b log(b D_k / price)

D_k is the mean predicted loss of the prompts that code k takes and b what the logarithm of a loss falls by for a unit
of cost (`aptp.price`): b D_k is what one more unit saves them. At the router's price prompts cost the budget
(`aptp.calibration.set_price`): it is infinite where all codes are too large, and zero where none is large enough. Where
sizes rest, all codes' marginal losses are the price.
"""

from collections.abc import Callable
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from aptp.cost import CostTable
from aptp.noise import Noise
from aptp.objectives import PruningConfig
from aptp.price import Marginals
from aptp.router import Router

_DRAWS: Final = 8  # of noise, that the codes' sizes are averaged over when they part
_FOLLOW: Final = 0.5  # a threshold moves by this for each unit of cost that a code is cut smaller than it is trained
_ABOVE_LEAST: Final = 1.02  # the smallest size, of what a code costs when all of its width gates are closed


def target_cost(step: int | Tensor, config: PruningConfig) -> float | Tensor:
    """What the routed prompts shall cost at a step of stage 1: it falls from the whole network to the budget."""
    share = step / max(1.0, config.descent * config.warmup_steps)
    share = share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)
    return 1 + (config.budget - 1) * share


@torch.no_grad()
def hold_sizes(
    router: Router,
    trained: Float[Tensor, " code"],
    as_cut: Float[Tensor, " code"],
    usage: Float[Tensor, " code"],
    target: float | Tensor,
    rate: float,
) -> None:
    """All codes follow the target by one amount, and a code is cut at the size that it is trained at."""
    over = (usage * trained).sum() - target
    # A code without prompts feels no price: what the others' holds against would carry it away.
    router.offsets.sub_(rate * over * (usage * router.num_codes).clamp(max=1.0))
    router.widening.add_(_FOLLOW * (trained - as_cut))


@torch.no_grad()
def part_sizes(
    router: Router, table: CostTable, codes: Float[Tensor, "code gate"], noise: Noise, config: PruningConfig
) -> None:
    """The codes leave the warm-up at unlike sizes: the smallest for the first, the largest for the last."""
    span, count = config.size_span, router.num_codes
    if count == 1 or span == 0:
        return
    wanted = config.budget * torch.linspace(1 - span, 1 + span, count, device=codes.device)
    draws = noise.of(torch.arange(_DRAWS * count, device=codes.device)).gumbel(codes.shape[1], use="parting")
    each = draws.unflatten(0, (_DRAWS, count))

    def trained() -> Float[Tensor, " code"]:
        return torch.stack([table.ratio(router.code_gates(codes, draw)) for draw in each]).mean(0)

    def as_cut() -> Float[Tensor, " code"]:
        return table.ratio(router.harden(router.code_gates(codes)))

    _move_to_sizes(router.offsets, trained, wanted.clamp(table.minimum, 1.0))
    _move_to_sizes(router.widening, as_cut, trained())


@torch.no_grad()
def set_sizes(router: Router, table: CostTable, wanted: Float[Tensor, " code"]) -> None:
    """Moves every code's own threshold until it costs what is wanted, or as near as its width can bring it."""
    _move_to_sizes(router.offsets, lambda: table.ratio(router.harden(router.code_gates(router.codes))), wanted)
    router.costs.copy_(table.ratio(router.harden(router.code_gates(router.codes))))


@torch.no_grad()
def _move_to_sizes(
    shifts: Float[Tensor, " code"], ratios: Callable[[], Float[Tensor, " code"]], wanted: Float[Tensor, " code"]
) -> None:
    """Sets `shifts`, on which `ratios()` depends, code by code, to where the ratio is nearest to what is wanted.

    A ratio at which width has nothing left to give is met from above: far below all of its gates a code could not find
    back.
    """
    low, high = torch.full_like(shifts, -30.0), torch.full_like(shifts, 30.0)
    shifts.copy_(low)
    wanted = torch.maximum(wanted, _ABOVE_LEAST * ratios())
    for _ in range(24):
        shifts.copy_((low + high) / 2)
        small = ratios() < wanted
        low, high = torch.where(small, shifts, low), torch.where(small, high, shifts)
    shifts.copy_(low)
    below = wanted - ratios()
    shifts.copy_(high)
    shifts.copy_(torch.where(ratios() - wanted < below, high, low))


@torch.no_grad()
def adapted_sizes(
    sizes: Float[Tensor, " code"], found: Marginals, price: Float[Tensor, ""], *, rate: float, most: float
) -> Float[Tensor, " code"]:
    """One step there: `rate` of the way, and `most` of a size at most, as where codes are of nearly one size b says
    little. A code that takes few prompts moves with the others."""
    mean = (found.usage * found.lost).sum()
    own = (found.usage * len(sizes)).clamp(max=1.0)
    marginal = found.fall * (mean + own * (found.lost - mean))
    gain = (marginal.clamp_min(1e-12) / price.clamp_min(1e-12)).log() / found.fall.clamp_min(1e-6)
    return torch.where(found.known, sizes + sizes * (rate * gain / sizes).clamp(-most, most), sizes)
