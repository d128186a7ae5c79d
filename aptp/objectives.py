"""What the two stages minimise: the weights and options of their objectives, as plain values.

Plain also in that nothing heavy is imported here: a run's configuration holds these, and every process reads that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PruningConfig:
    """The objective of stage 1. Values are the paper's and its code's, except where a reason is given.

    budget: the mean MACs ratio over the prompts as they are routed, at the cost table's resolution.
    warmup_steps: steps in which each prompt's own gates are used and the task reaches the predictor, not the codes.
    contrastive: "row" does not depend on the batch size; paper() gives "bce" with weight 100.
    pull_weight: 0 in the official code, where nothing makes inference agree with the transport.
    spread_weight, largest_weight: 0.1 in the official code. They reward codes for differing in size whether or not
        their prompts need it, without bound: runs end with one code nearly whole and the others starved.
    assignment_noise: the official code assigns by noisy gates; without noise a prompt is trained as it will be routed.
    forward_gates: "soft" samples in the forward pass, or "hard" ones, straight through.
    transport_epsilon: 0.05 in the paper; similarities of codes of one budget differ by hundredths, so the plan is then
        nearly flat, and its largest entries starve a code of prompts while its marginals look balanced.
    transport_iterations: 3 in the official code, which does not reach the marginals.
    usage_decay: of the moving average of the codes' usage under inference's rule, which weighs the budget.
    """

    budget: float = 0.6
    warmup_steps: int = 500
    output_weight: float = 0.2
    feature_weight: float = 0.2
    resource_weight: float = 2.0
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
    transport_epsilon: float = 0.005
    transport_iterations: int = 100
    usage_decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.budget < 1:
            raise ValueError(f"budget must lie between 0 and 1 (a share of the full model's MACs), it is {self.budget}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, it is {self.warmup_steps}")
        if not 0 <= self.usage_decay < 1:
            raise ValueError(f"usage_decay must lie in [0, 1), it is {self.usage_decay}")
        _require_weights(vars(self))

    @classmethod
    def paper(cls, budget: float = 0.6) -> "PruningConfig":
        """The official objective, where it is sound."""
        return cls(
            budget,
            contrastive="bce",
            contrastive_weight=100.0,
            pull_weight=0.0,
            spread_weight=0.1,
            largest_weight=0.1,
            normalise_features=False,
            assignment_noise=True,
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
