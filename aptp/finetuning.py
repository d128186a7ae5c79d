"""Stage 2: an expert learns, from its own prompts and from the full model, what cutting took from it.

L = l_task denoising + l_out ||expert - teacher||^2 + l_feat features                          (APTP, section 3)
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aptp.gates import block_features
from aptp.latents import Batch
from aptp.losses import Gather, LossTerms, NoiseSchedule, alone, denoising_loss, feature_loss, per_sample_error
from aptp.noise import Noise, sample_noise
from aptp.objectives import FinetuningConfig


class FinetuningStage(nn.Module):
    """One step of stage 2. Every weight of `expert` is trainable; `teacher`, the full UNet, is frozen.

    null_states: the text states of the null prompt, `encode_texts(tokenizer, text_encoder, [""])[0]`; needed unless
    null_share is 0.
    """

    null_states: Tensor | None

    def __init__(
        self,
        expert: nn.Module,
        teacher: nn.Module,
        scheduler: Any,
        config: FinetuningConfig,
        *,
        null_states: Float[Tensor, "token text"] | None = None,
    ) -> None:
        super().__init__()
        if expert is teacher:
            raise ValueError("expert and teacher are the same module: cut the expert with slice_unet first")
        if config.null_share and null_states is None:
            raise ValueError(
                f"null_share is {config.null_share}, so null_states is needed: "
                'encode_texts(tokenizer, text_encoder, [""])[0]; or set null_share to 0'
            )
        self.expert = expert.requires_grad_(True)
        self.teacher = teacher.eval().requires_grad_(False)
        self.config = config
        self.schedule = NoiseSchedule(scheduler)
        self.register_buffer("null_states", null_states, persistent=False)

    def train(self, mode: bool = True) -> "FinetuningStage":
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def learned_state(self) -> dict[str, Tensor]:
        """The expert's weights: all that a checkpoint needs."""
        return {f"expert.{name}": value for name, value in self.expert.state_dict().items()}

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        self.expert.load_state_dict({name.removeprefix("expert."): value for name, value in state.items()})

    def forward(self, batch: Batch, *, noise: Noise, gather: Gather = alone) -> LossTerms:
        """The terms of one batch. noise: of the batch's rows."""
        return self.measure(batch, noise, gather)[0]

    def measure(
        self, batch: Batch, noise: Noise, gather: Gather = alone
    ) -> tuple[LossTerms, Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """The terms; by row, without gradient: the distillation error, and the time t in [0, 1) of its noise."""
        config = self.config
        added, timesteps = sample_noise(batch.latents, len(self.schedule), noise)
        noisy = self.schedule.noisy(batch.latents, added, timesteps)
        texts = self._drop(batch.text_states, noise)

        with torch.no_grad(), block_features(self.teacher) as taught:
            teacher = self.teacher(noisy, timesteps, texts, return_dict=False)[0]
        with block_features(self.expert) as learnt:
            student = self.expert(noisy, timesteps, texts, return_dict=False)[0]

        target = self.schedule.target(batch.latents, added, timesteps)
        weight = self.schedule.min_snr_weight(timesteps, config.snr_gamma)
        errors = per_sample_error(student, teacher)
        terms = {"denoising": denoising_loss(student, target, weight), "output": errors.mean()}
        if config.feature_weight:
            terms["feature"] = feature_loss(learnt, taught, normalise=config.normalise_features, gather=gather)
        weights = {name: getattr(config, f"{name}_weight") for name in terms}
        return LossTerms(terms, weights), errors.detach(), timesteps / len(self.schedule)

    def _drop(self, text_states: Float[Tensor, "batch token text"], noise: Noise) -> Float[Tensor, "batch token text"]:
        if self.null_states is None or not self.config.null_share:
            return text_states
        dropped = noise.uniform(1, 1, use="null") < self.config.null_share
        return torch.where(dropped, self.null_states.to(text_states.dtype), text_states)
