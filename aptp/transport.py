"""Prompts are assigned to codes by entropic optimal transport, balanced over the codes as far as is asked for.

    Q* = argmax_Q <Q, C> + epsilon H(Q) - rho KL(Q^T 1 || 1/K)       with Q 1 = 1/B

for scores C (B, K). rho = infinity is the paper's balanced transport (Q^T 1 = 1/K), rho = 0 leaves every prompt its
best code. Sinkhorn's iterations solve it in the log domain and fp32 (Cuturi 2013; Chizat et al. 2018 for a finite rho).

The solution has the form Q_bk = exp((C_bk + u_b + v_k) / epsilon), and a prompt's code, argmax_k Q_bk, depends on its
own row and the K potentials v alone. That is what makes this work across workers (everyone solves for the gathered
scores and assigns their own rows) and at inference (potentials learned once are a fixed bias of each code).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Transport:
    """plan sums to 1; potentials v are in units of the scores and have mean zero; indices = argmax_k (C + v)."""

    plan: Float[Tensor, "batch code"]
    potentials: Float[Tensor, " code"]
    indices: Int[Tensor, " batch"]


@torch.no_grad()
def assign(
    scores: Float[Tensor, "batch code"],
    *,
    epsilon: float = 0.05,
    iterations: int = 100,
    balance: float = math.inf,
) -> Transport:
    """Solves the module's problem; `balance` is rho, in units of the scores.

    Raises:
        ValueError: a score is not finite, or a setting is out of its range.
    """
    batch, codes = scores.shape
    if epsilon <= 0 or iterations < 1 or not balance >= 0:
        raise ValueError(
            f"epsilon and iterations must be positive and balance not negative, they are {epsilon}, {iterations} "
            f"and {balance}"
        )
    values = scores.float()
    if not torch.isfinite(values).all():
        raise ValueError("scores must be finite; a NaN or an infinity reached the transport")
    # A finite rho damps the update that would meet the codes' shares exactly (Chizat et al. 2018, section 4).
    damping = 1.0 if math.isinf(balance) else balance / (balance + epsilon)
    ours, theirs = values.new_zeros(batch, 1), values.new_zeros(codes)
    for _ in range(iterations):
        theirs = -damping * epsilon * (((values + ours) / epsilon).logsumexp(0) + math.log(codes))
        ours = -epsilon * (((values + theirs) / epsilon).logsumexp(1, keepdim=True) + math.log(batch))
    plan, potentials = torch.exp((values + ours + theirs) / epsilon), theirs - theirs.mean()
    return Transport(plan, potentials, (values + potentials).argmax(dim=1))
