"""How large codes should be: where one more unit of cost saves every code's prompts what the router pays for it.

    s_k <- s_k + rate / b log(b D_k / price)

s_k is the MACs ratio of code k, D_k the mean predicted loss of the prompts that it takes and b what the logarithm of a
loss falls by for a unit of cost (`aptp.price`): b D_k is what one more unit saves them. At the router's price prompts
cost the budget (`aptp.calibration.set_price`): it is infinite where all codes are too large, and zero where none is
large enough. Where sizes rest, all codes' marginal losses are the price.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from aptp.price import Marginals


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
