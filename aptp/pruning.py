"""Stage 1: the router and its codes are learned on a frozen, gated UNet.

    e = predictor(z);  A = codes;  k(b) = argmax of the balanced transport of <phi(e_b), phi(A_k)>
    x_t, target = noised latents;  teacher = UNet with open gates;  student = UNet with the gates of A_k(b), sampled
    L = denoising + distillation + budget + contrastive + pull + spread                           (APTP, Algorithm 1)

The UNet is the teacher and the student: one set of weights, no gradient to any of them. The module is single-device
code. Across workers `gather` joins rows (W workers, each (B, ...), give (W B, ...)); its backward must sum over the
workers and the trainer average gradients over them, as torch.distributed.nn's all_gather and DDP do: then every term is
that of the global batch. A row's noise depends on the row and the step, a code's on the code and the step
(`aptp.noise`): neither depends on the worker.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aptp.codes import PruningSpace
from aptp.cost import CostTable
from aptp.gates import block_features, gated
from aptp.latents import Batch
from aptp.losses import (
    Gather,
    LossTerms,
    NoiseSchedule,
    alone,
    contrastive_loss,
    denoising_loss,
    feature_loss,
    output_loss,
    pull_loss,
    resource_loss,
    spread,
)
from aptp.noise import Noise, sample_noise
from aptp.objectives import PruningConfig
from aptp.router import Router, code_usage
from aptp.transport import balanced_assignment


class PruningStage(nn.Module):
    """One step of stage 1: `stage(batch, noise=Noise(seed, step, batch.rows))` gives the loss's terms.

    Only the router's predictor and codes are trainable. `learned_state` is all that a checkpoint needs.
    """

    usage: Tensor

    def __init__(
        self,
        unet: nn.Module,
        space: PruningSpace,
        table: CostTable,
        router: Router,
        scheduler: Any,
        config: PruningConfig,
    ) -> None:
        super().__init__()
        if router.space.fingerprint != space.fingerprint:
            raise ValueError("router and space differ: build the router from the space that was read from this UNet")
        if config.budget < table.minimum:
            raise ValueError(
                f"budget {config.budget} is below {table.minimum:.3f}, the least MACs ratio of this space: raise it"
            )
        self.unet = unet.eval().requires_grad_(False)
        self.space, self.table, self.router, self.config = space, table, router, config
        self.schedule = NoiseSchedule(scheduler)
        self.register_buffer("usage", torch.full((router.num_codes,), 1 / router.num_codes))

    def train(self, mode: bool = True) -> "PruningStage":
        """The frozen UNet stays in evaluation mode."""
        super().train(mode)
        self.unet.eval()
        return self

    def learned_state(self) -> dict[str, Tensor]:
        """Everything a run has learned or remembers: the router's tensors and the usage, not the UNet."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("unet.")}

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        missing = set(self.learned_state()) ^ set(state)
        if missing:
            raise ValueError(f"a pruning stage's learned state differs in {sorted(missing)}")
        self.load_state_dict(state, strict=False)

    def forward(self, batch: Batch, *, noise: Noise, gather: Gather = alone) -> LossTerms:
        """noise: of the batch's rows; its step says whether this is the warm-up."""
        config, router = self.config, self.router
        warm = bool(noise.step < config.warmup_steps)

        logits, codes = router(batch.embeddings)
        code_noise = noise.of(torch.arange(len(codes), device=codes.device)).gumbel(codes.shape[1], use="codes")
        prompt_noise = noise.gumbel(logits.shape[1], use="prompts")
        sampled_codes = router.gates(codes, code_noise)
        free_codes, free_prompts = router.gates(codes), router.gates(logits)
        sampled_prompts = router.gates(logits, prompt_noise)

        # The transport sees everybody's prompts; its potentials then assign this worker's rows.
        noisy = config.assignment_noise
        ours = router.features(sampled_prompts if noisy else free_prompts)
        theirs = router.features(sampled_codes if noisy else free_codes).detach()
        similarity = ours @ theirs.T
        transport = balanced_assignment(
            gather(similarity.detach()), epsilon=config.transport_epsilon, iterations=config.transport_iterations
        )
        assigned = (similarity.detach() + transport.potentials).argmax(1)

        gates = sampled_prompts if warm else sampled_codes[assigned]
        mask = router.harden(gates) if config.forward_gates == "hard" else gates
        terms = self._denoise(batch, mask, noise, gather)

        routed = router.route_logits(logits, codes)
        self._remember(gather(routed.usage().unsqueeze(0)).mean(0))
        code_ratios = self.table.ratio(router.harden(free_codes))
        if warm:
            ratios = gather(self.table.ratio(router.harden(free_prompts)))
            shares = torch.ones_like(ratios)
        else:
            # Half the weight is the transport's equal share: a code that inference does not use yet would otherwise
            # have no budget, drift away from the others, and stay unused.
            ratios, shares = code_ratios, (self.usage + 1 / router.num_codes) / 2
        ratio = (shares * ratios).sum() / shares.sum()
        terms["resource"] = resource_loss(ratio, config.budget)
        terms["spread"] = -spread(ratios, shares)
        terms["largest"] = 1 - ratios.max()
        terms["contrastive"] = contrastive_loss(
            gather(batch.embeddings),
            gather(ours),
            temperature=config.contrastive_temperature,
            form=config.contrastive,
        )
        terms["pull"] = pull_loss(similarity, assigned, temperature=config.pull_temperature)
        return LossTerms(
            terms,
            {name: getattr(config, f"{name}_weight") for name in terms if name != "denoising"},
            {
                "ratio": ratio.detach(),
                "code_ratios": code_ratios.detach(),
                "usage": self.usage.clone(),
                "transport_usage": code_usage(transport.indices, router.num_codes),
                "agreement": (routed.indices == assigned).float().mean(),
                "margin": routed.margins.mean(),
            },
        )

    def _denoise(self, batch: Batch, mask: Tensor, noise: Noise, gather: Gather = alone) -> dict[str, Tensor]:
        added, timesteps = sample_noise(batch.latents, len(self.schedule), noise)
        noisy = self.schedule.noisy(batch.latents, added, timesteps)
        with gated(self.unet, self.space) as gates, block_features(self.unet) as features:
            gates.open()
            with torch.no_grad():
                teacher = self.unet(noisy, timesteps, batch.text_states, return_dict=False)[0]
            taught = list(features)
            gates.set(mask)
            student = self.unet(noisy, timesteps, batch.text_states, return_dict=False)[0]
            learnt = list(features)
        target = self.schedule.target(batch.latents, added, timesteps)
        weight = self.schedule.min_snr_weight(timesteps, self.config.snr_gamma)
        terms = {"denoising": denoising_loss(student, target, weight), "output": output_loss(student, teacher)}
        if self.config.feature_weight:
            terms["feature"] = feature_loss(learnt, taught, normalise=self.config.normalise_features, gather=gather)
        return terms

    @torch.no_grad()
    def _remember(self, usage: Float[Tensor, " code"]) -> None:
        decay = self.config.usage_decay
        self.usage.mul_(decay).add_(usage, alpha=1 - decay)
