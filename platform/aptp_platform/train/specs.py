"""From a run's config to what its workers train: the two stages, picklable values that build themselves on a worker."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aptp.calibration import calibrate_budget
from aptp.codes import PruningSpace
from aptp.cost import CostTable, cost_table
from aptp.expert import load_expert, read_expert_info, save_expert
from aptp.finetuning import FinetuningStage
from aptp.gates import gated
from aptp.latents import Batch, encode_texts
from aptp.losses import LossTerms
from aptp.prompts import PromptEncoder
from aptp.pruning import PruningStage
from aptp.router import Router
from aptp.routes import RouterConfig
from aptp_platform.config import RouterSection, RunConfig, TrainingConfig
from aptp_platform.config_file import dump_config, to_tree
from aptp_platform.data.encoded import latent_size
from aptp_platform.models import PipelineParts, fetch_model, load_pipeline_parts, pruning_space
from aptp_platform.run.facts import FREE_IN_TRAINING, section_facts
from aptp_platform.run.layout import (
    CURVES,
    CUT,
    FINETUNED,
    PRUNED,
    ROUTER,
    TENSORBOARD,
    assigned_router,
    home,
    network_of,
)
from aptp_platform.storage.store import Store
from aptp_platform.train.curve import Curve, Measured
from aptp_platform.train.engine import compute_in
from aptp_platform.train.heldout_test import HeldOutTest
from aptp_platform.train.loop import Summary, Work
from aptp_platform.train.samples import draw
from aptp_platform.train.stream import Stream

CALIBRATION_PROMPTS = 2048  # the budget is met on so many prompts of the training set, evenly taken


@dataclass(frozen=True)
class PruneSpec:
    """Router and codes learn on the frozen, gated UNet; publishes `pruned/router/`."""

    config: RunConfig
    stream: Stream
    teacher: Mapping[str, float] = field(default_factory=dict)  # its losses on held-out rows, by key, as far as known
    name: str = "prune"

    @property
    def training(self) -> TrainingConfig:
        return self.config.prune.run

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def log(self) -> Store:
        return Store.open(self.config.root, self.config.storage).join(PRUNED, TENSORBOARD)

    @property
    def resolved(self) -> str:
        return dump_config(self.config)

    def depends_on(self) -> Mapping[str, Any]:
        sections = {"prune": {"objective": to_tree(self.config.prune.objective), "run": result_of(self.training)}}
        return {**common_of(self.config), **sections}

    def build(self, device: torch.device) -> Work:
        config, parts = self.config, load_pipeline_parts(self.config.model, self.config.storage)
        embeddings = self.stream.embeddings(CALIBRATION_PROMPTS)
        space = pruning_space(parts.unet, config.space)
        table = cost_table_of(parts, space, self.stream)
        shape = router_config(config.router, embeddings.shape[1])
        generator = torch.Generator().manual_seed(config.seed)
        router = Router(space, shape, generator=generator)
        router.centre_embeddings(embeddings)
        objective = replace(config.prune.objective, budget=config.router.budget)
        module = PruningStage(parts.unet, space, table, router, parts.scheduler, objective)
        compute_in(parts.unet, self.training.engine.precision)
        if self.training.engine.activation_checkpointing:
            parts.unet.enable_gradient_checkpointing()
        return Work(
            module,
            partial(batches_of, self.stream, parts, self.training, device),
            self._facts,
            partial(self._finish, module, table, embeddings),
            self._curve(module, parts),
            self._pictures(module, parts),
        )

    def _curve(self, module: PruningStage, parts: PipelineParts) -> Curve | None:
        """Each row under the hard mask of the code that it is routed to now."""
        test = HeldOutTest.of(self.config, parts, self.training, self.teacher)
        if test is None:
            return None

        @torch.no_grad()
        def measure() -> Measured:
            router = module.router
            embeddings = test.embeddings.to(router.bias.device)
            masks = router.harden(router.code_gates(router(embeddings)[1]))
            routes = router.route_embeddings(embeddings).indices.tolist()
            return test.under_codes(module.unet, module.space, masks, module.table.ratio(masks), routes)

        return Curve(Store.open(self.config.root, self.config.storage).join(PRUNED, CURVES), self.name, measure)

    def _pictures(self, module: PruningStage, parts: PipelineParts) -> Callable[[], dict[str, np.ndarray]]:
        """The full model above, below it the codes that the prompts are routed to now."""
        config = self.config
        if not config.samples.prompts:
            return dict
        encoder = PromptEncoder.load(fetch_model(config.model.prompt_encoder, config.storage))
        prompts = encoder.encode(config.samples.prompts)

        @cache
        def teacher() -> np.ndarray:
            return draw(module.unet, parts, config.samples, config.data.image_size)

        @torch.no_grad()
        def pictures() -> dict[str, np.ndarray]:
            taught, router = teacher(), module.router
            routes = router.route_embeddings(prompts.to(router.bias.device)).indices
            masks = torch.stack([code.mask for code in router.architecture_codes()]).to(router.bias.device)
            with gated(module.unet, module.space) as gates:
                gates.set(masks[routes])
                drawn = draw(module.unet, parts, config.samples, config.data.image_size)
            return {"samples": np.stack([taught, drawn])}

        return pictures

    def _facts(self, terms: LossTerms) -> dict[str, float | str]:
        usage = terms.metrics["usage"]
        return {
            "ratio": float(terms.metrics["ratio"]),
            "target": self.config.router.budget,
            "usage": f"{float(usage.min()):.2f}-{float(usage.max()):.2f}",
        }

    def _finish(
        self, module: PruningStage, table: CostTable, embeddings: Tensor, values: Mapping[str, Tensor]
    ) -> Summary:
        """Meet the budget on prompts as they will be routed, publish. Whether each code has enough, assign decides."""
        learned = {**module.learned_state(), **values}
        router = Router(module.space, module.router.config)
        if router.need is not None:
            router.need.reserve(router.config.need.memory)
        state = {name.removeprefix("router."): value for name, value in learned.items() if name.startswith("router.")}
        router.load_state_dict({name: value.cpu() for name, value in state.items()})
        if router.need is not None and module.memory is not None and module.memory.count:
            router.need.observe(module.memory.cpu().observations(), drifting=True)  # however few: they are all there is
        budget, objective = self.config.router.budget, self.config.prune.objective
        found = calibrate_budget(router.eval(), embeddings, table, budget, balance=objective.balance, allow_unused=True)
        with tempfile.TemporaryDirectory() as scratch:
            router.save(Path(scratch) / ROUTER)
            pruned = Store.open(self.config.root, self.config.storage).join(PRUNED)
            pruned.publish(Path(scratch) / ROUTER, ROUTER, last=("router.json",))
        bits = torch.stack([code.bits for code in router.architecture_codes()]).float()
        return {
            "codes": router.num_codes,
            "MACs ratio": round(found.ratio, 4),
            "budget": self.config.router.budget,
            "before calibration": round(found.ratio_before, 4),
            "ratios": [round(ratio, 4) for ratio in table.ratio(bits).tolist()],
            "usage": [round(share, 4) for share in found.usage],
        }


@dataclass(frozen=True)
class FinetuneSpec:
    """One cut network learns from the full one, on its own captions; publishes `finetuned/<network>/`."""

    config: RunConfig
    stream: Stream
    network: str  # a folder of `cut/`: a code's number or a baseline's name
    steps: int

    @property
    def name(self) -> str:
        return f"finetune-{self.network}"

    @property
    def training(self) -> TrainingConfig:
        return replace(self.config.finetune.run, steps=self.steps)

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def log(self) -> Store:
        return Store.open(self.config.root, self.config.storage).join(FINETUNED, TENSORBOARD, self.network)

    @property
    def resolved(self) -> str:
        return dump_config(self.config)

    def depends_on(self) -> Mapping[str, Any]:
        sections = {
            "prune": {"objective": to_tree(self.config.prune.objective)},
            "finetune": {"objective": to_tree(self.config.finetune.objective), "run": result_of(self.training)},
        }
        return {**common_of(self.config), **sections}

    def build(self, device: torch.device) -> Work:
        parts = load_pipeline_parts(self.config.model, self.config.storage)
        with tempfile.TemporaryDirectory() as scratch:
            cut = self._cut(scratch)
            expert, info = load_expert(cut).float(), read_expert_info(cut)
        table = cost_table(
            parts.unet,
            info.code.space,
            latent_size=info.cost.latent_size,
            num_text_tokens=info.cost.num_text_tokens,
            convention=info.cost.convention,
        )
        module = FinetuningStage(
            expert,
            parts.unet,
            parts.scheduler,
            self.config.finetune.objective,
            null_states=encode_texts(parts.tokenizer, parts.text_encoder, [""])[0],
        )
        for network in (expert, parts.unet):
            compute_in(network, self.training.engine.precision)
        if self.training.engine.activation_checkpointing:
            expert.enable_gradient_checkpointing()
        return Work(
            module,
            partial(batches_of, self.stream, parts, self.training, device),
            lambda terms: {"denoising": float(terms.terms["denoising"].detach())},
            partial(self._finish, table),
            self._curve(module, parts, info.cost.ratio),
            self._pictures(module, parts),
        )

    def _curve(self, module: FinetuningStage, parts: PipelineParts, cost: float) -> Curve | None:
        """The network on the rows that the router sends to it; one that answers for all prompts on all rows."""
        test = HeldOutTest.of(self.config, parts, self.training, {})
        if test is None:
            return None
        root = Store.open(self.config.root, self.config.storage)
        rows = list(range(len(test.embeddings)))
        if self.network not in self.config.cut.baselines:
            routes = assigned_router(self.config).route_embeddings(test.embeddings).indices.tolist()
            rows = [row for row in rows if network_of(routes[row]) == self.network]
        if not rows:
            print(f"[{self.name}] none of the {len(test.embeddings)} held-out rows goes to this network: no curve")
            return None
        return Curve(root.join(FINETUNED, CURVES), self.network, lambda: test.of_network(module.expert, rows, cost))

    def _pictures(self, module: FinetuningStage, parts: PipelineParts) -> Callable[[], dict[str, np.ndarray]]:
        """The full model above, below it the network that learns from it."""
        samples, size = self.config.samples, self.config.data.image_size
        if not samples.prompts:
            return dict

        @cache
        def teacher() -> np.ndarray:
            return draw(module.teacher, parts, samples, size)

        return lambda: {"samples": np.stack([teacher(), draw(module.expert, parts, samples, size)])}

    def _finish(self, table: CostTable, values: Mapping[str, Tensor]) -> Summary:
        with tempfile.TemporaryDirectory() as scratch:
            cut = self._cut(scratch)
            expert, info = load_expert(cut), read_expert_info(cut)
            expert.load_state_dict({name.removeprefix("expert."): value for name, value in values.items()})
            save_expert(Path(scratch) / "tuned", expert, info.code, base=info.base, cost=table)
            root = Store.open(self.config.root, self.config.storage)
            root.join(FINETUNED).publish(Path(scratch) / "tuned", self.network, last=("code.json",))
        return {"network": self.network, "MACs ratio": round(info.cost.ratio, 4)}

    def _cut(self, scratch: str) -> Path:
        return home(self.config, "cut").join(CUT).fetch(self.network, scratch)


def batches_of(
    stream: Stream,
    parts: PipelineParts,
    training: TrainingConfig,
    device: torch.device,
    start: int,
    rank: int,
    ranks: int,
) -> Iterator[Batch]:
    """Text states, too large to store, are computed here: of the very caption whose embedding the batch holds."""
    parts.text_encoder.to(device)
    stop = training.steps * training.engine.gradient_accumulation
    for rows in stream.batches(training.batch_size, start, stop, rank, ranks):
        yield Batch(
            torch.from_numpy(rows["latents"].astype(np.float32)).to(device),
            encode_texts(parts.tokenizer, parts.text_encoder, rows["captions"].tolist()),
            torch.from_numpy(rows["embeddings"].astype(np.float32)).to(device),
            torch.tensor(rows["rows"], device=device),
        )


def router_config(section: RouterSection, embedding_dim: int) -> RouterConfig:
    """The library's config of the router that a run asks for."""
    tree = to_tree(section)
    del tree["budget"]
    return RouterConfig.from_json({**tree, "embedding_dim": embedding_dim})


def cost_table_of(parts: PipelineParts, space: PruningSpace, stream: Stream) -> CostTable:
    """At the size of the latents and the number of text tokens that are trained on."""
    size = latent_size(stream.encoded)
    return cost_table(parts.unet, space, latent_size=size, num_text_tokens=parts.tokenizer.model_max_length)


def common_of(config: RunConfig) -> dict[str, Any]:
    return {"seed": config.seed, **{name: section_facts(config, name) for name in ("model", "router", "space")}}


def result_of(training: TrainingConfig) -> dict[str, Any]:
    """The fields of a training that change its steps: not by how many workers, how often it is saved, what is measured
    then, nor how many there are, unless the learning rate follows from it."""
    tree = to_tree(training)
    for name in FREE_IN_TRAINING:
        *sections, field = name.split(".")
        del (tree[sections[0]] if sections else tree)[field]
    steps = tree.pop("steps")
    if training.final_learning_rate is not None:
        tree["steps"] = steps
    return tree
