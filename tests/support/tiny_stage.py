"""Stage 1 on the tiny UNet: a stage, a batch of random rows, a step."""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from dataclasses import replace

import torch
from diffusers import DDPMScheduler

from aptp.latents import Batch
from aptp.noise import Noise
from aptp.objectives import PruningConfig
from aptp.pruning import PruningStage
from aptp.router import Router
from aptp.routes import RouterConfig

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
STEADY = PruningConfig(budget=0.6, warmup_steps=0)


def a_stage(unet, space, table, config: PruningConfig = STEADY, seed: int = 0, **router) -> PruningStage:
    options = replace(RouterConfig(3, 16), **router)
    made = Router(space, options, generator=torch.Generator().manual_seed(seed))
    return PruningStage(unet, space, table, made, SCHEDULER, config)


def a_batch(count: int = 8, seed: int = 0) -> Batch:
    noise = torch.Generator().manual_seed(seed)
    shapes = ((count, 4, 8, 8), (count, 5, 24), (count, 16))
    latents, texts, embeddings = (torch.randn(shape, generator=noise) for shape in shapes)
    return Batch(latents, texts, embeddings, torch.arange(count))


def run(stage: PruningStage, batch: Batch, step: int = 0, **options):
    return stage(batch, noise=Noise(0, step, batch.rows), **options)
