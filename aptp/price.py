"""What a unit of cost is worth in stage 1: to the codes, which pay for their size, and to the router, which chooses.

    to the codes    price <- price exp(rate (r / p - 1))   dual ascent; r: what the routed prompts cost, p: the target
    to the router   slope = b sum_k usage_k D_k

Where the codes' price rests, gates do not drift against the thresholds that hold the cost (`aptp.pruning`). The
router's is measured, because routes react at once and the codes' price does not. D_k is what code k's own prompts lose
by prediction, and b what the logarithm of a loss falls by for a unit of cost, over the codes: b D_k is what one more
unit saves the prompts of code k. Logarithms, because a line through the losses themselves is nearly flat if one code is
near the whole network, and at so low a price all prompts would go there.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from aptp.objectives import PruningConfig

_NEAR: Final = 0.1  # of the target: with all of the distance the price would grow while gates cannot move yet
_FIRST: Final = 5.0  # where the budget binds, prices are near 10
_MOST: Final = 1e3
_LEAST_LOSS: Final = 0.01  # of the largest code's: what is predicted for a code near the whole network can be negative
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
        paid = self.multiplier * self.exchange[1]
        return torch.where(self.slope > 0, self.slope, paid)

    def of_size(self, ratio: Float[Tensor, ""], over: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The objective's term for what the routed prompts cost; moves the multiplier by `over`, the share of the
        target that they cost too much.

        It moves by shares of itself: at small budgets it is many times what it is at large ones.
        """
        self.multiplier.mul_((self.config.price_rate * over.clamp(-_NEAR, _NEAR)).exp()).clamp_(_LEAST, _MOST)
        return self.multiplier * self.exchange[0] * ratio

    @torch.no_grad()
    def observe(self, added: Float[Tensor, " row"], errors: Float[Tensor, " row"]) -> None:
        """What a step has measured on all rows: what pruning adds to the objective, and the error to the teacher."""
        measured = torch.stack([added.abs().mean(), errors.mean()])
        first = (self.exchange == 0).all()
        self.exchange.lerp_(measured, torch.where(first, 1.0, 1 - self.config.usage_decay))

    @torch.no_grad()
    def measure(self, found: "Marginals") -> None:
        """The slope, from what a step has found on all rows."""
        weight = torch.where(self.slope == 0, 1.0, 1 - self.config.usage_decay)
        self.slope.lerp_(found.fall * (found.usage * found.lost).sum(), torch.where(found.known, weight, 0.0))


@dataclass(frozen=True)
class Marginals:
    """b, D_k and the share of the rows that each code has, of one sample of rows; `known` if codes differ in size."""

    fall: Float[Tensor, ""]
    lost: Float[Tensor, " code"]
    usage: Float[Tensor, " code"]
    known: Bool[Tensor, ""]


@torch.no_grad()
def marginals(
    costs: Float[Tensor, " code"], losses: Float[Tensor, "row code"], assigned: Int[Tensor, " row"]
) -> Marginals:
    """From all codes' predicted losses of some rows, and the rows' codes."""
    logs = losses.mean(0).clamp_min(1e-12)
    logs = logs.clamp_min(_LEAST_LOSS * logs.max()).log()
    apart = costs - costs.mean()
    spread = apart.square().sum()
    fall = (-(apart * logs).sum() / spread.clamp_min(1e-12)).clamp_min(0)
    taken = F.one_hot(assigned, len(costs)).to(losses)
    rows = taken.sum(0)
    lost = (taken * losses).sum(0) / rows.clamp_min(1)
    return Marginals(fall, lost.clamp_min(0), rows / len(losses), (spread > 1e-6) & (fall > 0))
