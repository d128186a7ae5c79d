"""What a router is asked for and what it answers: its configuration, and where prompts go."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aptp.need import NeedConfig
from aptp.relax import Relaxation


class UnusedCodeError(ValueError):
    """A code to which no prompt is routed: it would become an expert without training data."""


@dataclass(frozen=True)
class RouterConfig:
    """num_codes K, embedding_dim of the prompt encoder, the rule of routing, and how logits start.

    routing: "need", or the paper's "similarity". similarity_weight: w, the loss that a similarity of one makes up for.
    initial_logit, initial_spread: logits of codes and predictor start at N(initial_logit, initial_spread^2). The paper
        starts at 0 with orthonormal rows (spread about 1/sqrt(D)), where a gate's slope is 0.0014 and all codes are
        equal to rounding: paper() gives that. Starting nearer the threshold, -offset = -3, lets a short run learn.
    initial_depth: the start of the logit that stands for "keep all depth" in an ordered space. At the paper's 0 the
        gates that go first start three quarters open, and a few steps of the budget's pressure close them.
    normalise: the predictor sees z centred and divided by its 1-norm, so that one step of Adam moves its logits at most
        as far as it moves a code's, and one learning rate serves both. The paper feeds z as it is.
    features: "soft", or the paper's "mixed" (hard bits, but soft products under a depth gate).
    """

    num_codes: int = 16
    embedding_dim: int = 768
    relaxation: Relaxation = field(default_factory=Relaxation)
    routing: Literal["need", "similarity"] = "need"
    need: NeedConfig = field(default_factory=NeedConfig)
    similarity_weight: float = 0.0
    initial_logit: float = -2.0
    initial_spread: float = 0.2
    initial_depth: float = 2.0
    normalise: bool = True
    features: Literal["soft", "mixed"] = "soft"

    def __post_init__(self) -> None:
        for name in ("num_codes", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if self.initial_spread <= 0:
            raise ValueError(f"initial_spread must be positive (equal codes cannot part), it is {self.initial_spread}")
        if self.features not in ("soft", "mixed"):
            raise ValueError(f"features must be 'soft' or 'mixed', it is {self.features!r}")
        if self.routing not in ("need", "similarity"):
            raise ValueError(f"routing must be 'need' or 'similarity', it is {self.routing!r}")
        if self.similarity_weight < 0:
            raise ValueError(f"similarity_weight must not be negative, it is {self.similarity_weight}")

    @classmethod
    def paper(cls, num_codes: int = 16, embedding_dim: int = 768) -> "RouterConfig":
        """The published router's own rule, start and features."""
        return cls(
            num_codes,
            embedding_dim,
            routing="similarity",
            initial_logit=0.0,
            initial_spread=0.025,
            initial_depth=0.0,
            normalise=False,
            features="mixed",
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RouterConfig":
        """Of a router on disk; one without `routing` is older than the need head and routes by similarity."""
        known = {"routing": "similarity", "need": {}, **data}
        return cls(**{**known, "relaxation": Relaxation(**data["relaxation"]), "need": NeedConfig(**known["need"])})


@dataclass(frozen=True)
class Routes:
    """Where prompts go, and why.

    indices: each prompt's code. scores: what the rule maximises, in units of loss where need decides, else of
    similarity. margins: best score minus second (0 for K = 1). similarities: C. losses: what each code is expected to
    add to a prompt's denoising loss; None where similarity decides.
    """

    indices: Int[Tensor, " batch"]
    scores: Float[Tensor, "batch code"]
    margins: Float[Tensor, " batch"]
    similarities: Float[Tensor, "batch code"]
    losses: Float[Tensor, "batch code"] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def usage(self) -> Float[Tensor, " code"]:
        """Each code's share of these prompts."""
        return code_usage(self.indices, self.scores.shape[1])


def code_usage(indices: Int[Tensor, " batch"], num_codes: int) -> Float[Tensor, " code"]:
    """Each code's share of the prompts."""
    codes = torch.arange(num_codes, device=indices.device)
    return (indices[:, None] == codes).float().sum(0) / max(len(indices), 1)


def require_used(usage: Float[Tensor, " code"]) -> None:
    """UnusedCodeError, naming them, if there are codes without a prompt."""
    unused = [index for index, share in enumerate(usage.tolist()) if share == 0]
    if unused:
        raise UnusedCodeError(
            f"no prompt is routed to code {', '.join(map(str, unused))} of {len(usage)} "
            f"(usage {[round(share, 3) for share in usage.tolist()]}): "
            "lower num_codes, train longer, route more prompts, or raise the weight that balances the codes"
        )
