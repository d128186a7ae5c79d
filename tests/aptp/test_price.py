"""Both prices of stage 1, where the loss is known: what a unit of cost saves is the same for every code."""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

import pytest
import torch

from aptp.calibration import calibrate_budget
from aptp.cost import cost_table
from aptp.latents import Batch
from aptp.need import NeedConfig
from aptp.objectives import PruningConfig
from aptp.sites import read_space
from tests.support import tiny
from tests.support.tiny_stage import a_stage, run


@pytest.mark.parametrize(("needs", "slope", "budget"), [((1.0, 4.0), 12.0, 0.4), ((1.0, 1.5, 3.0, 5.0), 8.0, 0.6)])
def test_at_convergence_a_unit_of_cost_saves_every_code_the_same_loss(needs, slope, budget):
    """The loss is need exp(-slope cost): each kind of prompt has its code, and costs differ by ln(need) / slope."""
    unet = tiny.unet()
    space = read_space(unet)
    table = cost_table(unet, space, (8, 8), 5)
    need = torch.tensor(needs)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(len(needs), 16, generator=generator)

    def draw(count: int) -> Batch:
        kind = torch.arange(count) % len(needs)
        seen = centres[kind] + 0.05 * torch.randn(count, 16, generator=generator)
        ids = torch.randint(2**40, (count,), generator=generator) * len(needs) + kind
        return Batch(torch.zeros(count, 4, 8, 8), torch.zeros(count, 5, 24), seen, ids)

    config = PruningConfig(budget=budget, warmup_steps=60, exploration=0.2, feature_weight=0.0)
    head = NeedConfig(length=0.5, noise=0.3, memory=360, enough=96)
    stage = a_stage(unet, space, table, config, num_codes=len(needs), need=head)

    def known(batch, mask, noise, gather):
        loss = need[batch.rows % len(needs)] * torch.exp(-slope * table.ratio(mask))
        return {"denoising": loss.mean()}, loss.detach(), loss.detach(), noise.uniform(use="timesteps")

    stage._denoise = known
    optimizer = torch.optim.AdamW(stage.router.parameters(), lr=0.03, weight_decay=0.0)
    for step in range(220):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * min(1.0, (220 - step) / 66)  # so that it comes to rest
        optimizer.zero_grad()
        run(stage, draw(12), step).total.backward()
        optimizer.step()
    fresh = draw(240)
    calibrate_budget(stage.router, fresh.embeddings, table, budget, tolerance=0.03, balance=config.balance)
    costs = stage.router.costs[stage.router.route_embeddings(fresh.embeddings).indices]
    saved = (
        slope * need * torch.exp(-slope * torch.stack([costs[kind :: len(needs)].mean() for kind in range(len(needs))]))
    )
    assert saved.max() / saved.min() < 1.5, saved
    alike = slope * need * torch.exp(torch.tensor(-slope * budget))
    assert alike.max() / alike.min() > 3.9, "with codes of one size it would differ as the needs do"
