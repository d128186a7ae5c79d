"""What a unit of cost is worth in stage 1: to the codes, which pay for their size, and to the router, which chooses.

    to the codes    price <- [price + rate (r - p)]_+     dual ascent; r: what the routed prompts cost, p: the budget
    to the router   slope = -cov_k(d_k, r_k) / var_k(r_k)  what the mean predicted losses d_k fall by, over the codes

At convergence the two agree: one more unit of cost saves every code's prompts the same loss. Until then the router's is
measured, because routes react at once and sizes do not: at the codes' price, which starts too low and moves slowly, all
prompts would go to the largest code.
"""

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aptp.objectives import PruningConfig

_NEAR: Final = 0.1  # of the budget: a price that grew with all of the distance would grow while gates cannot move yet
_FIRST: Final = 5.0  # where the budget binds, prices are near 10
_LEAST: Final = 0.5  # for routing: where the budget does not bind, what gains next to nothing goes to the cheaper code


class Price(nn.Module):
    """Both prices; its buffers are part of what stage 1 learns.

    Attributes:
        multiplier: the codes' price, in units of what pruning adds to the objective. slope: the router's, in units of
            the predicted error; 0 until codes have parted. exchange: moving averages of what pruning adds to the
            objective, in size, and of the error that the need head predicts.
    """

    multiplier: Tensor
    slope: Tensor
    exchange: Tensor

    def __init__(self, config: PruningConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("multiplier", torch.tensor(_FIRST))
        self.register_buffer("slope", torch.zeros(()))
        self.register_buffer("exchange", torch.zeros(2))

    @property
    def of_routing(self) -> Float[Tensor, ""]:
        """The router's price; until the slope is known, what the objective pays for a unit."""
        paid = self.multiplier.clamp_min(_LEAST) * self.exchange[1]
        return torch.where(self.slope > 0, self.slope, paid)

    def of_size(self, ratio: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The objective's term for what the routed prompts cost; moves the multiplier."""
        over = ratio.detach() - self.config.budget
        paid = (self.multiplier + self.config.price_gain * over).clamp_min(0)
        most = _NEAR * self.config.budget
        self.multiplier.add_(self.config.price_rate * over.clamp(-most, most)).clamp_(min=0)
        return paid * self.exchange[0] * ratio

    @torch.no_grad()
    def observe(self, added: Float[Tensor, " row"], errors: Float[Tensor, " row"]) -> None:
        """What a step has measured on all rows: what pruning adds to the objective, and the error to the teacher."""
        measured = torch.stack([added.abs().mean(), errors.mean()])
        first = (self.exchange == 0).all()
        self.exchange.lerp_(measured, torch.where(first, 1.0, 1 - self.config.usage_decay))

    @torch.no_grad()
    def measure(self, costs: Float[Tensor, " code"], losses: Float[Tensor, " code"]) -> None:
        """The slope, from the codes' costs and their mean predicted losses on the same prompts."""
        costs = costs - costs.mean()
        spread = costs.square().sum()
        slope = (-(costs * losses).sum() / spread.clamp_min(1e-12)).clamp_min(0)
        weight = torch.where(self.slope == 0, 1.0, 1 - self.config.usage_decay)
        self.slope.lerp_(slope, torch.where(spread > 1e-6, weight, 0.0))
