"""What the two stages minimise: the weights and options of their objectives, as plain values.

Plain also in that nothing heavy is imported here: a run's configuration holds these, and every process reads that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal


@dataclass(frozen=True)
class PruningConfig:
    """The objective of stage 1. Values are the paper's and its code's, except where a reason is given.

    budget: the mean MACs ratio over the prompts as they are routed, at the cost table's resolution.
    warmup_steps: the first steps, which learn what all codes then start from.
    warmup: "parent": all codes are one, which every prompt trains; the paper's "prompts": each prompt's own gates are
        used, and the task reaches the predictor, not the codes.
    size_span: when the warm-up ends the codes part, at sizes from budget (1 - span) to budget (1 + span). 0 leaves them
        as they are: codes of one size give a prompt's need nothing to choose from.
    resource: "price": a multiplier, raised while the routed prompts cost more than the budget and lowered while they
        cost less, is what one unit of cost costs every code; the paper's "log" is |ln(ratio / budget)|, a force of
        fixed size, whose share in a code is not its share of the task.
    price_rate: per step, the price grows by the share rate * (cost / target - 1), where the second factor counts as a
        tenth at most. It is in units of what pruning adds to the objective: where loss falls with cost as
        exp(-10 cost), the price is 10, whatever the network and the terms' weights.
    hold: how fast the thresholds of all codes follow together: they move by hold * (target - cost) per step.
    descent: the share of the warm-up during which the target falls from the whole network to the budget.
    exploration: the share of prompts that are measured under a code drawn at random, and do not train it, so that every
        code's loss is known for every kind of prompt. need_every: steps between two fits of the need head.
    contrastive: "row" does not depend on the batch size; paper() gives "bce" with weight 100.
    pull_weight: 0 in the official code, where nothing makes inference agree with the transport.
    spread_weight, largest_weight: 0.1 in the official code. They reward codes for differing in size whether or not
        their prompts need it, without bound: runs end with one code nearly whole and the others starved.
    assignment_noise: the official code assigns by noisy gates; without noise a prompt is trained as it will be routed.
    forward_gates: "soft" samples in the forward pass, or "hard" ones, straight through.
    balance: what an unequal use of the codes costs, rho of `aptp.transport`; infinite in the paper, where a code's
        share is given and need cannot choose it. In units of the mean predicted loss where need routes.
    transport_epsilon: 0.05 in the paper; similarities of codes of one budget differ by hundredths, so the plan is then
        nearly flat, and its largest entries starve a code of prompts while its marginals look balanced.
    transport_iterations: 3 in the official code, which does not reach the marginals.
    usage_decay: of the moving averages over steps: the codes' usage under inference's rule, and the exchange rate
        between the objective and the error that the need head predicts.
    """

    budget: float = 0.6
    warmup_steps: int = 500
    warmup: Literal["parent", "prompts"] = "parent"
    size_span: float = 0.15
    output_weight: float = 0.2
    feature_weight: float = 0.2
    resource: Literal["price", "log"] = "price"
    resource_weight: float = 2.0
    price_rate: float = 0.5
    hold: float = 0.5
    descent: float = 0.5
    exploration: float = 0.15
    need_every: int = 10
    contrastive_weight: float = 1.0
    contrastive: Literal["row", "bce"] = "row"
    contrastive_temperature: float = 0.03
    pull_weight: float = 1.0
    pull_temperature: float = 0.1
    spread_weight: float = 0.0
    largest_weight: float = 0.0
    snr_gamma: float = 5.0
    normalise_features: bool = True
    assignment_noise: bool = False
    forward_gates: Literal["soft", "hard"] = "soft"
    balance: float = 0.3
    transport_epsilon: float = 0.005
    transport_iterations: int = 100
    usage_decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.budget < 1:
            raise ValueError(f"budget must lie between 0 and 1 (a share of the full model's MACs), it is {self.budget}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, it is {self.warmup_steps}")
        for name in ("usage_decay", "size_span", "descent"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), it is {getattr(self, name)}")
        if not 0 <= self.exploration <= 1:
            raise ValueError(f"exploration must be a share in [0, 1], it is {self.exploration}")
        if self.need_every < 1:
            raise ValueError(f"need_every must be at least 1 step, it is {self.need_every}")
        for name in ("price_rate", "hold", "balance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")
        _require_weights(vars(self))

    @classmethod
    def paper(cls, budget: float = 0.6) -> "PruningConfig":
        """The official objective, where it is sound."""
        return cls(
            budget,
            warmup="prompts",
            size_span=0.0,
            resource="log",
            exploration=0.0,
            contrastive="bce",
            contrastive_weight=100.0,
            pull_weight=0.0,
            spread_weight=0.1,
            largest_weight=0.1,
            normalise_features=False,
            assignment_noise=True,
            balance=inf,
            transport_epsilon=0.05,
            transport_iterations=3,
        )


@dataclass(frozen=True)
class FinetuningConfig:
    """The objective of stage 2; weights are the official ones for CC3M (COCO: 1.0, 0.2, 0.2).

    null_share: the share of a batch whose caption is replaced by the null prompt. The official code has none, so the
        branch that classifier-free guidance subtracts was never trained in the cut network.
    """

    denoising_weight: float = 0.01
    output_weight: float = 0.5
    feature_weight: float = 0.5
    snr_gamma: float = 5.0
    normalise_features: bool = True
    null_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.null_share < 1:
            raise ValueError(f"null_share must lie in [0, 1), it is {self.null_share}")
        _require_weights(vars(self))

    @classmethod
    def paper(cls) -> "FinetuningConfig":
        """The official objective."""
        return cls(normalise_features=False, null_share=0.0)


def _require_weights(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name.endswith("_weight") and value < 0:
            raise ValueError(f"{name} must not be negative, it is {value}")
