"""Prompts are assigned to codes by balanced optimal transport: each code gets its share of the batch.

    Q* = argmax_Q <Q, C> + epsilon H(Q)   with   Q 1 = 1/B,  Q^T 1 = marginals

for the similarities C (B, K). POT's Sinkhorn in the log domain solves it in fp32 (Cuturi 2013; Feydy et al. 2019).
The solution has the form Q_bk = exp((C_bk + u_b + v_k) / epsilon), and a prompt's code, argmax_k Q_bk, depends on its
own row and the K potentials v alone. That is what makes this work across workers (everyone solves for the gathered
similarities and assigns their own rows) and at inference (potentials learned once are a fixed capacity bias).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aptp.pot import sinkhorn


@dataclass(frozen=True)
class Transport:
    """plan sums to 1; potentials v are in units of similarity and have mean zero; indices = argmax_k (C + v)."""

    plan: Float[Tensor, "batch code"]
    potentials: Float[Tensor, " code"]
    indices: Int[Tensor, " batch"]


@torch.no_grad()
def balanced_assignment(
    similarity: Float[Tensor, "batch code"],
    *,
    epsilon: float = 0.05,
    iterations: int = 100,
    marginals: Float[Tensor, " code"] | None = None,
) -> Transport:
    """Solves the module's problem; `marginals` (uniform unless given) are each code's share, positive, summing to 1."""
    batch, codes = similarity.shape
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"epsilon and iterations must be positive, they are {epsilon} and {iterations}")
    scores = similarity.float()
    if not torch.isfinite(scores).all():
        raise ValueError("similarities must be finite; a NaN or an infinity reached the transport")
    share = scores.new_full((codes,), 1 / codes)
    if marginals is not None:
        share = marginals.to(scores)
        if share.shape != (codes,) or (share <= 0).any() or abs(float(share.sum()) - 1) > 1e-4:
            raise ValueError(f"marginals must be {codes} positive shares that sum to 1, they are {share.tolist()}")
    plan, log = sinkhorn(
        scores.new_full((batch,), 1 / batch),
        share,
        -scores,
        epsilon,
        method="sinkhorn_log",
        numItermax=iterations,
        stopThr=1e-7,
        log=True,
        warn=False,
    )
    potentials = epsilon * (log["log_v"] - log["log_v"].mean())
    return Transport(plan, potentials, (scores + potentials).argmax(dim=1))
