"""Stage 1: the router and its codes are learned on a frozen, gated UNet.

    e = predictor(z);  A = codes;  C = <phi(e), phi(A)>;  d = need head(z);  r = MACs ratios of the codes
    k(b) = argmax of the transport of  w C_bk - d_bk - slope r_k          (by need; the paper's: of C_bk, balanced)
    x_t, target = noised latents;  teacher = UNet with open gates;  student = UNet with the gates of A_k(b), sampled
    L = denoising + distillation + price sum_k usage_k r_k + contrastive + pull
    price <- price exp(rate (sum_k usage_k r_k / budget - 1))

The last two lines are dual ascent: where they rest, the routed prompts cost the budget and each code's loss falls by
the same price per unit of cost, so that capacity stands where it is needed. For that, a code feels task and price
through the same sampled gates, and is cut at the size that it is trained at. All thresholds together hold the cost at
the budget, which a price alone reaches late. To the router a unit of cost is worth what it saves the prompts.
The paper's Algorithm 1 is `paper()` of the router's and the objective's configs.

The UNet is the teacher and the student: one set of weights, no gradient to any of them. The module is single-device
code. Across workers `gather` joins rows (W workers, each (B, ...), give (W B, ...)); its backward must sum over the
workers and the trainer average gradients over them, as torch.distributed.nn's all_gather and DDP do: then every term is
that of the global batch. A row's noise depends on the row and the step, a code's on the code and the step
(`aptp.noise`): neither depends on the worker.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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
    feature_loss,
    per_sample_error,
    pull_loss,
    resource_loss,
    spread,
)
from aptp.need import NeedMemory, Observations
from aptp.noise import Noise, sample_noise
from aptp.objectives import PruningConfig
from aptp.price import Price, marginals
from aptp.router import Router
from aptp.routes import code_usage
from aptp.sizes import hold_sizes, part_sizes, target_cost
from aptp.transport import Transport, assign

_FIRST_EXPLORATION: Final = 0.5  # the share of prompts that are only measured until the need head can be solved for


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
        self.memory = None
        if router.need is not None:
            router.need.reserve(router.config.need.memory)
            self.memory = NeedMemory(router.config.embedding_dim, router.config.need.memory)
        self.register_buffer("usage", torch.full((router.num_codes,), 1 / router.num_codes))
        self.price = Price(config)

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
        if warm and config.warmup == "parent":
            codes = codes.mean(0, keepdim=True).expand_as(codes)
        elif noise.step == config.warmup_steps:
            part_sizes(router, self.table, codes, noise, config)
            self.usage.fill_(1 / router.num_codes)
        code_noise = noise.of(torch.arange(len(codes), device=codes.device)).gumbel(codes.shape[1], use="codes")
        sampled_codes, free_codes = router.code_gates(codes, code_noise), router.code_gates(codes)
        sampled_prompts = router.gates(logits, noise.gumbel(logits.shape[1], use="prompts"))
        free_prompts = router.gates(logits)
        code_ratios, sampled_ratios = self.table.ratio(router.harden(free_codes)), self.table.ratio(sampled_codes)
        router.costs.copy_(code_ratios.detach())
        router.price.copy_(self.price.of_routing)

        noisy = config.assignment_noise
        ours = router.features(sampled_prompts if noisy else free_prompts)
        theirs = router.features(sampled_codes if noisy else free_codes).detach()
        similarity = ours @ theirs.T
        losses = None if router.need is None else router.need(batch.embeddings)
        alone_gates = warm and config.warmup == "prompts"
        parted = router.num_codes > 1 and not warm
        assigned, explored, transport = self._assign(similarity.detach(), losses, noise, gather, parted=parted)

        gates = sampled_prompts if alone_gates else sampled_codes[assigned]
        mask = router.harden(gates) if config.forward_gates == "hard" else gates
        if explored is not None:
            # Measured as it will be cut, which sampled gates are not; and measured only: a code learns from the prompts
            # that it will serve.
            mask = torch.where(explored[:, None], router.harden(free_codes)[assigned].detach(), mask)
        terms, errors, added, times = self._denoise(batch, mask, noise, gather)
        if not alone_gates:
            self._remember(batch, assigned, explored, times, errors, added, noise.step, gather)

        routed = router.route_logits(logits, codes, losses)
        decay = config.usage_decay
        self.usage.mul_(decay).add_(gather(routed.usage().unsqueeze(0)).mean(0), alpha=1 - decay)
        if alone_gates:
            ratios = gather(self.table.ratio(router.harden(free_prompts)))
            shares = torch.ones_like(ratios)
        elif config.resource == "price":
            usage = torch.ones_like(self.usage) / router.num_codes if warm else self.usage
            hold_sizes(
                router,
                sampled_ratios.detach(),
                code_ratios.detach(),
                usage,
                target_cost(noise.step, config),
                config.hold,
            )
            ratios, shares = code_ratios, self.usage.clone()
        else:
            # Half the weight is the transport's equal share: a code that inference does not use yet would otherwise
            # have no budget, drift away from the others, and stay unused.
            ratios, shares = code_ratios, (self.usage + 1 / router.num_codes) / 2
        ratio = (shares * ratios).sum() / shares.sum()
        if config.resource == "price" and not alone_gates:
            # The value is what prompts cost as they are routed and cut. The gradient is of the sampled gates of the
            # rows that train a code, as the task's is, so that a code feels both alike.
            trains = F.one_hot(assigned, router.num_codes).float()
            if explored is not None:
                trains = trains * ~explored[:, None]
            felt = (gather(trains).mean(0) * sampled_ratios).sum()
            ratio = ratio.detach() + felt - felt.detach()
        terms["resource"] = self._pay(ratio, noise.step)
        terms["spread"] = -spread(ratios, shares)
        terms["largest"] = 1 - ratios.max()
        terms["contrastive"] = contrastive_loss(
            gather(batch.embeddings),
            gather(ours),
            temperature=config.contrastive_temperature,
            form=config.contrastive,
        )
        terms["pull"] = pull_loss(similarity, assigned, temperature=config.pull_temperature)
        weights = {name: getattr(config, f"{name}_weight") for name in terms if name != "denoising"}
        if config.resource == "price":
            weights["resource"] = 1.0  # the multiplier is the weight
        return LossTerms(
            terms,
            weights,
            {
                "ratio": ratio.detach(),
                "code_ratios": code_ratios.detach(),
                "usage": self.usage.clone(),
                "price": self.price.multiplier.clone(),
                "transport_usage": code_usage(transport.indices, router.num_codes),
                "trained": code_usage(assigned, router.num_codes),
                "agreement": (routed.indices == assigned).float().mean(),
                "margin": routed.margins.mean(),
            },
        )

    @torch.no_grad()
    def _assign(
        self,
        similarity: Float[Tensor, "row code"],
        losses: Float[Tensor, "row code"] | None,
        noise: Noise,
        gather: Gather,
        *,
        parted: bool,
    ) -> tuple[Int[Tensor, " row"], Bool[Tensor, " row"] | None, Transport]:
        """Each row's code, and whether it is there only to be measured, which is of use once codes have `parted`. The
        transport sees everybody's prompts; its potentials assign our rows."""
        config, router = self.config, self.router
        scores = router.scores(similarity, losses) - (0 if losses is None else router.bias)
        everyone = gather(scores)
        unit = scores.new_ones(())
        if losses is not None:  # in units in which `balance` and `transport_epsilon` mean the same all along
            predicted = gather(losses).mean(0)
            unit = predicted.mean().clamp_min(1e-12)
            scores, everyone = scores / unit, everyone / unit
        transport = assign(
            everyone,
            epsilon=config.transport_epsilon,
            iterations=config.transport_iterations,
            balance=config.balance,
        )
        assigned = (scores + transport.potentials).argmax(1)
        if self.memory is None or losses is None:
            return assigned, None, transport
        if parted:
            self.price.measure(marginals(router.costs, gather(losses), gather(assigned)))
        # What routes by the router alone, the price above all, sees the codes' shares as the transport sets them.
        router.bias.lerp_(unit * transport.potentials, 1 - config.usage_decay)
        unknown = self.memory.count < router.config.need.enough
        share = torch.where(unknown, max(_FIRST_EXPLORATION, config.exploration), config.exploration)
        explored = noise.uniform(use="exploration") < share if parted else None
        drawn = noise.integers(router.num_codes, use="explored code")
        random = unknown if explored is None else explored | unknown
        return torch.where(random, drawn, assigned), explored, transport

    @torch.no_grad()
    def _remember(
        self,
        batch: Batch,
        assigned: Int[Tensor, " row"],
        explored: Bool[Tensor, " row"] | None,
        times: Float[Tensor, " row"],
        errors: Float[Tensor, " row"],
        added: Float[Tensor, " row"],
        step: int | Tensor,
        gather: Gather,
    ) -> None:
        """What this step has measured: of the codes' errors, and of their price in the objective."""
        self.price.observe(*gather(torch.stack([added, errors], 1)).unbind(1))
        if self.memory is None or self.router.need is None or explored is None:
            return
        (rows,) = torch.nonzero(gather(explored), as_tuple=True)
        seen = Observations(*(gather(each)[rows] for each in (batch.embeddings, assigned, times, errors)))
        before, enough = int(self.memory.count), self.router.config.need.enough
        self.memory.add(seen)
        if before + len(seen) >= enough and (before < enough or step % self.config.need_every == 0):
            self.router.need.observe(self.memory.observations(), drifting=True)

    def _pay(self, ratio: Float[Tensor, ""], step: int | Tensor) -> Float[Tensor, ""]:
        if self.config.resource == "log":
            return resource_loss(ratio, self.config.budget)
        return self.price.of_size(ratio, ratio.detach() / target_cost(step, self.config) - 1)

    def _denoise(
        self, batch: Batch, mask: Tensor, noise: Noise, gather: Gather = alone
    ) -> tuple[dict[str, Tensor], Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """The task's terms; by row: the distillation error, what pruning adds to the objective, and t in [0, 1)."""
        config = self.config
        eps, timesteps = sample_noise(batch.latents, len(self.schedule), noise)
        noisy = self.schedule.noisy(batch.latents, eps, timesteps)
        with gated(self.unet, self.space) as gates, block_features(self.unet) as features:
            gates.open()
            with torch.no_grad():
                teacher = self.unet(noisy, timesteps, batch.text_states, return_dict=False)[0]
            taught = list(features)
            gates.set(mask)
            student = self.unet(noisy, timesteps, batch.text_states, return_dict=False)[0]
            learnt = list(features)
        target = self.schedule.target(batch.latents, eps, timesteps)
        weight = self.schedule.min_snr_weight(timesteps, config.snr_gamma)
        loss, errors = weight * per_sample_error(student, target), per_sample_error(student, teacher)
        terms = {"denoising": loss.mean(), "output": errors.mean()}
        added = (loss - weight * per_sample_error(teacher, target) + config.output_weight * errors).detach()
        if config.feature_weight:
            terms["feature"] = feature_loss(learnt, taught, normalise=config.normalise_features, gather=gather)
            added = added + config.feature_weight * terms["feature"].detach()
        return terms, errors.detach(), added, timesteps / len(self.schedule)
