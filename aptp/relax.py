"""Bits with gradients: logits become gates in [0, 1] that can be sampled, differentiated and hardened.

    width  y = sigmoid((z + g + b) / T), each entry for itself
    depth  s = softmax(z_d);  x_k = s_0 + ... + s_(n-1-k);  y_(order_k) = sigmoid((logit(x_k) + g + b) / T)

with Gumbel noise g, temperature T and offset b (APTP, Ganjdanesh et al. 2024, section 3; arXiv 2406.12042). The ordered
depth gates learn the length of a prefix of a fixed order: gate order_0 is kept longest, and as x_0 = 1 it never goes.
All of it is fp32 in the log domain, and noise is an argument: without it the gates are a function of the logits alone.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LOGIT_LIMIT: Final = 13.815510  # logit(1 - 1e-6)


@dataclass(frozen=True)
class Relaxation:
    """Temperature T and offset b; the defaults are the paper's."""

    temperature: float = 0.4
    offset: float = 3.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, it is {self.temperature}")


def width_gates(
    logits: Float[Tensor, "batch width"], noise: Float[Tensor, "batch width"] | None, relaxation: Relaxation
) -> Float[Tensor, "batch width"]:
    """sigmoid((z + g + b) / T) for every entry."""
    shifted = logits.float() + relaxation.offset
    return torch.sigmoid((shifted if noise is None else shifted + noise) / relaxation.temperature)


def depth_gates(
    logits: Float[Tensor, "batch depth"],
    noise: Float[Tensor, "batch depth"] | None,
    keep_order: Int[Tensor, " depth"] | None,
    relaxation: Relaxation,
) -> Float[Tensor, "batch depth"]:
    """The depth gates of the module's formula; keep_order[k] is the gate of rank k.

    Without an order every depth gate stands for itself, as width gates do.

    logit(x_k) is the difference of two log-sum-exps, of the logits up to n-1-k and of those beyond, so no probability
    is ever formed; it is limited to +-13.8 (x = 1 - 1e-6).
    """
    if keep_order is None or logits.shape[1] == 0:
        return width_gates(logits, noise, relaxation)
    z = logits.float()
    upto = torch.logcumsumexp(z, dim=1)
    beyond = F.pad(torch.logcumsumexp(z.flip(1), dim=1).flip(1)[:, 1:], (0, 1), value=-torch.inf)
    x_logit = (upto - beyond).clamp(-LOGIT_LIMIT, LOGIT_LIMIT).flip(1)
    rank = torch.argsort(keep_order)
    return width_gates(x_logit[:, rank], noise, relaxation)


def soft_gates(
    logits: Float[Tensor, "batch gate"],
    noise: Float[Tensor, "batch gate"] | None,
    width: int,
    keep_order: Int[Tensor, " depth"] | None,
    relaxation: Relaxation,
) -> Float[Tensor, "batch gate"]:
    """Logits of whole architectures, `width` width entries first and depth entries last, to gates in [0, 1]."""
    width_noise, depth_noise = (None, None) if noise is None else (noise[:, :width], noise[:, width:])
    return torch.cat(
        [
            width_gates(logits[:, :width], width_noise, relaxation),
            depth_gates(logits[:, width:], depth_noise, keep_order, relaxation),
        ],
        dim=1,
    )


def harden(soft: Float[Tensor, "batch gate"], site_index: Int[Tensor, " width"]) -> Float[Tensor, "batch gate"]:
    """H(y) = 1[y >= 1/2] with the gradient of the identity (straight through); a width site is never emptied.

    site_index[i] is the width site of entry i. Where no unit of a site reaches 1/2, its largest stays: removing a whole
    module is for the depth gates to do.
    """
    width = site_index.shape[0]
    batch = soft.shape[0]
    hard = (soft >= 0.5).to(soft.dtype)
    if width:
        index = site_index.expand(batch, -1)
        # There are at most `width` sites: to ask the tensor for their number would wait for the device.
        largest = soft.detach().new_full((batch, width), -torch.inf)
        largest = largest.scatter_reduce(1, index, soft.detach()[:, :width], "amax")
        survivor = soft[:, :width] >= largest.gather(1, index)
        hard = torch.cat([torch.maximum(hard[:, :width], survivor.to(hard.dtype)), hard[:, width:]], dim=1)
    return hard.detach() + (soft - soft.detach())
