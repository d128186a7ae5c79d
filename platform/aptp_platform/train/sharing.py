"""The shared training as a training spec: the full network's weights learn under the gates of all codes."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from aptp.latents import encode_texts
from aptp.losses import LossTerms
from aptp.router import Router
from aptp.sharing import SharingStage
from aptp_platform.config import RunConfig, TrainingConfig
from aptp_platform.config_file import dump_config, to_tree
from aptp_platform.models import PipelineParts, load_pipeline_parts
from aptp_platform.run.layout import CURVES, PRUNED, ROUTER, SHARED, TENSORBOARD, UNET, home
from aptp_platform.storage.store import Store
from aptp_platform.train.curve import Curve, Measured
from aptp_platform.train.engine import compute_in
from aptp_platform.train.heldout_test import HeldOutTest
from aptp_platform.train.loop import Summary, Work
from aptp_platform.train.specs import batches_of, common_of, cost_table_of, result_of
from aptp_platform.train.stream import Stream


@dataclass(frozen=True)
class ShareSpec:
    """Publishes `shared/unet/`, from which the codes are cut, and `shared/router/`, fitted to it."""

    config: RunConfig
    stream: Stream
    teacher: Mapping[str, float] = field(default_factory=dict)  # its losses on held-out rows, by key, as far as known
    name: str = "share"

    @property
    def training(self) -> TrainingConfig:
        return self.config.share.run

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def log(self) -> Store:
        return self._root.join(SHARED, TENSORBOARD)

    @property
    def resolved(self) -> str:
        return dump_config(self.config)

    @property
    def _root(self) -> Store:
        return Store.open(self.config.root, self.config.storage)

    def depends_on(self) -> Mapping[str, Any]:
        sections = {
            "prune": {"objective": to_tree(self.config.prune.objective)},
            "share": {
                "objective": to_tree(self.config.share.objective),
                "resize": self.config.share.resize,
                "run": result_of(self.training),
            },
        }
        return {**common_of(self.config), **sections}

    def build(self, device: torch.device) -> Work:
        config, parts = self.config, load_pipeline_parts(self.config.model, self.config.storage)
        with tempfile.TemporaryDirectory() as scratch:
            router = Router.load(home(config, "prune").join(PRUNED).fetch(ROUTER, scratch))
        student = copy.deepcopy(parts.unet).float()
        module = SharingStage(
            student,
            parts.unet,
            router.space,
            router,
            parts.scheduler,
            config.share.objective,
            config.router.budget,
            cost_table_of(parts, router.space, self.stream),
            null_states=encode_texts(parts.tokenizer, parts.text_encoder, [""])[0],
            balance=config.prune.objective.balance,
            resize_until=round(config.share.resize * self.training.steps),
        )
        for network in (student, parts.unet):
            compute_in(network, self.training.engine.precision)
        if self.training.engine.activation_checkpointing:
            student.enable_gradient_checkpointing()
        return Work(
            module,
            partial(batches_of, self.stream, parts, self.training, device),
            self._facts,
            partial(self._finish, module),
            self._curve(module, parts),
        )

    def _curve(self, module: SharingStage, parts: PipelineParts) -> Curve | None:
        """Each row under the mask of the code that it is routed to now."""
        test = HeldOutTest.of(self.config, parts, self.training, self.teacher)
        if test is None:
            return None

        def measure() -> Measured:
            student, router = module.distillation.expert, module.router
            routes = router.route_embeddings(test.embeddings.to(router.bias.device)).indices.tolist()
            return test.under_codes(student, module.space, module.codes, router.costs, routes)

        return Curve(self._root.join(SHARED, CURVES), self.name, measure)

    @staticmethod
    def _facts(terms: LossTerms) -> dict[str, float | str]:
        trained = terms.metrics["trained"]
        return {
            "denoising": float(terms.terms["denoising"].detach()),
            "ratio": float(terms.metrics["ratio"]),
            "trained": f"{float(trained.min()):.2f}-{float(trained.max()):.2f}",
        }

    def _finish(self, module: SharingStage, values: Mapping[str, Tensor]) -> Summary:
        student: Any = UNet2DConditionModel.from_config(module.distillation.expert.config)
        prefix = "distillation.expert."
        student.load_state_dict({name.removeprefix(prefix): value for name, value in values.items()})
        with tempfile.TemporaryDirectory() as scratch:
            student.save_pretrained(Path(scratch) / UNET, safe_serialization=True)
            module.router.cpu().save(Path(scratch) / ROUTER)
            shared = self._root.join(SHARED)
            shared.publish(Path(scratch) / UNET, UNET, last=("config.json",))
            shared.publish(Path(scratch) / ROUTER, ROUTER, last=("router.json",))
        return {
            "steps": self.training.steps,
            "price": round(float(module.router.price), 4),
            "ratios": [round(cost, 4) for cost in module.router.costs.tolist()],
        }
