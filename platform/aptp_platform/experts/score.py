"""What scores networks on held-out rows: whether the cluster holds a task, how long one takes, a sweep's own tasks."""

import time
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import ray
import torch
from torch import nn

from aptp.expert import load_expert
from aptp.latents import encode_texts
from aptp_platform.config import EvaluateConfig, RunConfig
from aptp_platform.data.heldout import HeldOut, read_held_out, row_losses
from aptp_platform.models import PipelineParts, load_pipeline_parts
from aptp_platform.run.layout import CUT, assigned_router, network_of
from aptp_platform.run.resources import require_room
from aptp_platform.storage.store import Store
from aptp_platform.train.curve import Measured
from aptp_platform.train.heldout_test import HeldOutTest

WARM_UP: Final = 1
TIMED: Final = 5


def check_scoring(config: EvaluateConfig) -> None:
    """ConfigError if the cluster can never run the task that scores a network."""
    shares = {
        "CPU": ("cpus_per_network", config.cpus_per_network),
        "GPU": ("gpus_per_network", config.gpus_per_network),
    }
    require_room("evaluate", None, 1, shares, spare=0.0)


@torch.no_grad()
def forward_milliseconds(config: EvaluateConfig, parts: PipelineParts, unet: nn.Module, held: HeldOut) -> float:
    """The median time of one forward pass of a batch of `config.batch_size` on the network's device."""
    device = next(unet.parameters()).device
    rows = (list(range(len(held.keys))) * config.batch_size)[: config.batch_size]
    text_encoder = parts.text_encoder.to(device)
    texts = encode_texts(parts.tokenizer, text_encoder, [held.captions[row] for row in rows])
    latents, at = held.latents[rows].to(device), torch.full((len(rows),), config.timesteps[0], device=device)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        unet(latents, at, encoder_hidden_states=texts, return_dict=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds[WARM_UP:]))


@dataclass(frozen=True)
class Scorer:
    """Measures on the first `rows` held-out rows, each time in a task."""

    config: RunConfig
    rows: int

    def teacher(self) -> dict[str, float]:
        """The full model's loss by key."""
        return ray.get(self._task(_teacher).remote(self.config, self.rows))

    def experts(self, teacher: dict[str, float], ratios: dict[str, float]) -> Measured:
        """The cut experts of the config's run, as its assigned router routes. ratios: their MACs ratios, by name."""
        return ray.get(self._task(_experts).remote(self.config, self.rows, teacher, ratios))

    def _task(self, task: Any) -> Any:
        return task.options(num_gpus=self.config.evaluate.gpus_per_network)


# DEFAULT: in a trial of Ray Tune a task would otherwise have to fit into the trial's own resources, next to none.
@ray.remote(num_cpus=0.5, scheduling_strategy="DEFAULT")
def _teacher(config: RunConfig, rows: int) -> dict[str, float]:
    parts, held = load_pipeline_parts(config.model, config.storage), read_held_out(config, rows)
    losses = row_losses(config.evaluate, parts, parts.unet.to(_device(config)), held, list(range(len(held.keys))))
    return dict(zip(held.keys, losses.tolist(), strict=True))


@ray.remote(num_cpus=0.5, scheduling_strategy="DEFAULT")
def _experts(config: RunConfig, rows: int, teacher: dict[str, float], ratios: dict[str, float]) -> Measured:
    test = HeldOutTest(config, load_pipeline_parts(config.model, config.storage), rows, teacher)
    own = Store.open(config.root, config.storage)
    names = [network_of(code) for code in assigned_router(config).route_embeddings(test.embeddings).indices.tolist()]
    extra = cost = 0.0
    with TemporaryDirectory() as scratch:
        for name in sorted(set(names)):
            expert = load_expert(own.join(CUT).fetch(name, scratch)).float().to(_device(config))
            mine = [row for row in range(len(names)) if names[row] == name]
            found = test.of_network(expert, mine, ratios[name])
            extra, cost = extra + found.rows * found.extra_loss, cost + found.rows * found.cost_ratio
    return Measured(extra / len(names), len(names), cost / len(names))


def _device(config: RunConfig) -> str:
    return "cuda" if config.evaluate.gpus_per_network else "cpu"
