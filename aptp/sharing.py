"""Between the stages: one set of weights is fine-tuned under the gates of all codes, before each code is cut out.

    k(b) = the code that the router gives prompt b;  student = the network's own copy under the gates of A_k(b)
    L = the objective of stage 2, for every row under its code

Experts that are fine-tuned apart share nothing of what they learn, and K of them lose to one network that was trained
as long as they together. Here every step trains the units that codes have in common, as weight-sharing supernets do
(Cai et al. 2020, "Once-for-All"). Routes follow: the errors that are measured on the way keep the router's need head
and price up to date, since what a code costs a prompt falls by an order of magnitude while its weights adapt.
"""

from math import inf
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from aptp.calibration import set_price
from aptp.codes import PruningSpace
from aptp.cost import CostTable
from aptp.finetuning import FinetuningStage
from aptp.gates import gated
from aptp.latents import Batch
from aptp.losses import Gather, LossTerms, alone
from aptp.need import NeedMemory, Observations
from aptp.noise import Noise
from aptp.objectives import FinetuningConfig
from aptp.price import marginals
from aptp.router import Router
from aptp.routes import code_usage
from aptp.sizes import adapted_sizes, set_sizes

_RESIZE: Final = 0.3  # of what would make the codes' marginal losses equal, at each fit of the need head
_FALL: Final = 3.0  # of the logarithm of a loss, for as much cost as the budget, where codes' sizes do not tell
_MOST: Final = 0.05  # of a code's size, that it moves at each fit


class SharingStage(nn.Module):
    """One step of the shared training: `stage(batch, noise=Noise(seed, step, batch.rows))` gives the loss's terms.

    Every weight of `student`, a copy of the full UNet, is trainable; `teacher` is frozen. `learned_state` is the
    student, the router and what the router was fitted to.

    Attributes:
        balance: what an unequal use of the codes costs, as in stage 1.
        exploration: the share of prompts under a code drawn at random: without it codes would be known only where they
            are used already. refit_every: steps between two fits of the need head and the price.
        resize_until: the step up to which the codes' sizes follow need at each fit; 0 leaves them as they are.
    """

    codes: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        space: PruningSpace,
        router: Router,
        scheduler: Any,
        config: FinetuningConfig,
        budget: float,
        table: CostTable,
        *,
        null_states: Float[Tensor, "token text"] | None = None,
        balance: float = 0.0,
        exploration: float = 0.15,
        refit_every: int = 20,
        resize_until: int = 0,
    ) -> None:
        super().__init__()
        self.distillation = FinetuningStage(student, teacher, scheduler, config, null_states=null_states)
        self.space, self.router, self.budget = space, router.requires_grad_(False), budget
        self.balance, self.exploration, self.refit_every = balance, exploration, refit_every
        self.table, self.resize_until = table, resize_until
        self.register_buffer("codes", self._masks(), persistent=False)
        self.memory = None
        if router.need is not None:
            router.need.reserve(router.config.need.memory)
            self.memory = NeedMemory(router.config.embedding_dim, router.config.need.memory)

    def learned_state(self) -> dict[str, Tensor]:
        """The student's weights, the router's tensors and the observations: all that a checkpoint needs."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("distillation.teacher.")}

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        missing = set(self.learned_state()) ^ set(state)
        if missing:
            raise ValueError(f"a sharing stage's learned state differs in {sorted(missing)[:5]}")
        self.load_state_dict(state, strict=False)
        self.codes.copy_(self._masks())

    def _masks(self) -> Tensor:
        return torch.stack([code.mask for code in self.router.architecture_codes()])

    def forward(self, batch: Batch, *, noise: Noise, gather: Gather = alone) -> LossTerms:
        """The terms of one batch, each row under its code."""
        assigned = self._assign(batch, noise)
        with gated(self.distillation.expert, self.space) as gates:
            gates.set(self.codes[assigned])
            terms, errors, times = self.distillation.measure(batch, noise, gather)
        if self.memory is not None:
            self._remember(self.memory, batch, assigned, times, errors, noise, gather)
        used = gather(code_usage(assigned, self.router.num_codes)[None]).mean(0)
        ratio = (used * self.router.costs).sum()
        return LossTerms(terms.terms, terms.weights, {"ratio": ratio, "trained": used})

    @torch.no_grad()
    def _assign(self, batch: Batch, noise: Noise) -> Int[Tensor, " row"]:
        routes = self.router.route_embeddings(batch.embeddings).indices
        if self.memory is None:
            return routes
        unknown = self.memory.count < self.router.config.need.enough
        explored = (noise.uniform(use="exploration") < self.exploration) | unknown
        return torch.where(explored, noise.integers(self.router.num_codes, use="explored code"), routes)

    @torch.no_grad()
    def _remember(
        self,
        memory: NeedMemory,
        batch: Batch,
        assigned: Int[Tensor, " row"],
        times: Float[Tensor, " row"],
        errors: Float[Tensor, " row"],
        noise: Noise,
        gather: Gather,
    ) -> None:
        assert self.router.need is not None
        seen = Observations(gather(batch.embeddings), gather(assigned), gather(times), gather(errors))
        before, enough = int(memory.count), self.router.config.need.enough
        memory.add(seen)
        if before + len(seen) >= enough and (before < enough or noise.step % self.refit_every == 0):
            kept, costs = memory.observations(), self.router.costs
            counts = torch.bincount(kept.codes, minlength=len(costs)).to(costs)
            self.router.need.observe(kept, drifting=True)
            self.router.need.level_by_cost(costs, counts, _FALL / self.budget)
            prompts = kept.embeddings
            set_price(self.router, prompts, self.budget, tolerance=inf, balance=self.balance)
            if noise.step < self.resize_until and self.router.num_codes > 1:
                self._resize(prompts)
                set_price(self.router, prompts, self.budget, tolerance=inf, balance=self.balance)

    def _resize(self, prompts: Float[Tensor, "prompt dim"]) -> None:
        """Sizes follow need, which is another now than before the weights were trained."""
        router = self.router
        routes = router.route_embeddings(prompts)
        assert routes.losses is not None
        found = marginals(router.costs, routes.losses, routes.indices)
        wanted = adapted_sizes(router.costs, found, router.price, rate=_RESIZE, most=_MOST)
        set_sizes(router, self.table, wanted.clamp(self.table.minimum, 1.0))
        self.codes.copy_(self._masks())
