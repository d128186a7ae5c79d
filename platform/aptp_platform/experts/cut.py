"""From codes to experts: one task per network cuts a code, or a baseline, out of the full UNet."""

import tempfile
from pathlib import Path
from typing import Any, Final

import ray
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from aptp.baselines import block_removal_code, magnitude_code, random_code, uniform_code
from aptp.codes import ArchitectureCode, PruningSpace
from aptp.cost import cost_table
from aptp.expert import BaseModel, save_expert
from aptp.slicing import slice_unet
from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.data.encoded import latent_size
from aptp_platform.models import load_pipeline_parts, load_whole
from aptp_platform.run.layout import CUT, SHARED, TRAIN_ROWS, UNET, assigned_router, home, network_of
from aptp_platform.run.progress import Progress
from aptp_platform.storage.store import Store

BASELINES: Final = ("uniform", "magnitude", "random", "block-removal")


def cut(config: RunConfig) -> dict[str, Any]:
    """Publish `cut/00/`, `cut/01/`, ... and `cut/<baseline>/`; returns each one's share of the full model's MACs.

    Raises:
        ConfigError: a baseline is unknown.
    """
    if unknown := [name for name in config.cut.baselines if name not in BASELINES]:
        raise ConfigError(f"cut.baselines: {unknown[0]!r}: must be one of {', '.join(BASELINES)}")
    router = assigned_router(config)
    codes = router.architecture_codes()
    wanted = {network_of(index): code for index, code in enumerate(codes)} | dict.fromkeys(config.cut.baselines)
    size = latent_size(home(config, "encode").join(TRAIN_ROWS))
    pending = {_cut_one.remote(config, name, code, router.space, size): name for name, code in wanted.items()}
    ratios: dict[str, float] = {}
    with Progress("cut", len(wanted)) as progress:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            name = pending.pop(ready)
            ratios[name] = ray.get(ready)
            progress.update(len(ratios), network=name, ratio=ratios[name])
    return {"networks": len(ratios), "MACs ratios": {name: round(ratios[name], 4) for name in wanted}}


# DEFAULT: in a trial of Ray Tune a task would otherwise have to fit into the trial's own resources, next to none.
@ray.remote(num_cpus=0.5, scheduling_strategy="DEFAULT")
def _cut_one(
    config: RunConfig, name: str, code: ArchitectureCode | None, space: PruningSpace, size: tuple[int, int]
) -> float:
    """Cut one network and publish it; without a code it is the baseline of that name."""
    parts = load_pipeline_parts(config.model, config.storage)
    root = Store.open(config.root, config.storage)
    table = cost_table(parts.unet, space, latent_size=size, num_text_tokens=parts.tokenizer.model_max_length)
    if code is None:
        code = _baseline(config, name, parts.unet, table)
    with tempfile.TemporaryDirectory() as scratch:
        small = slice_unet(_trained(config, parts.unet, shared=name not in config.cut.baselines), code)
        base = BaseModel.of(parts.unet, config.model.pipeline)
        save_expert(Path(scratch) / name, small, code, base=base, cost=table)
        root.join(CUT).publish(Path(scratch) / name, name, last=("code.json",))
    return float(table.ratio(code.mask[None])[0])


def _trained(config: RunConfig, unet: nn.Module, *, shared: bool) -> nn.Module:
    """The weights that a network is cut from: the shared ones, if the stage `share` trained any."""
    trained = home(config, "share").join(SHARED)
    if shared and trained.exists(f"{UNET}/config.json"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = trained.fetch(UNET, scratch)
            return load_whole(UNet2DConditionModel, folder)
    return unet


def _baseline(config: RunConfig, name: str, unet: Any, table: Any) -> ArchitectureCode:
    space, budget = table.space, config.router.budget
    if name == "random":
        return random_code(space, table, budget, generator=torch.Generator().manual_seed(config.seed))
    choose = {"uniform": uniform_code, "magnitude": magnitude_code, "block-removal": block_removal_code}[name]
    return choose(unet, space, table, budget)
