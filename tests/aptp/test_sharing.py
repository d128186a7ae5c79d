# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import copy

import pytest
import torch
from diffusers import DDPMScheduler

from aptp.cost import cost_table
from aptp.gates import gated
from aptp.latents import Batch
from aptp.need import NeedConfig
from aptp.noise import Noise
from aptp.objectives import FinetuningConfig
from aptp.router import Router
from aptp.routes import RouterConfig
from aptp.sharing import SharingStage
from aptp.sites import read_space
from aptp.sizes import set_sizes
from aptp.slicing import slice_unet
from tests.support import tiny

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
CONFIG = FinetuningConfig(null_share=0.0, denoising_weight=0.0, output_weight=1.0, feature_weight=0.0)


def a_stage(routing: str = "need", seed: int = 0, **options) -> SharingStage:
    """Two codes, the second larger than the first by its offset."""
    teacher = tiny.unet()
    space = read_space(teacher)
    need = NeedConfig(memory=64, enough=16)
    shape = RouterConfig(2, 16, routing=routing, need=need, initial_logit=-3.0)  # type: ignore[arg-type]
    router = Router(space, shape, generator=torch.Generator().manual_seed(seed))
    router.offsets.copy_(torch.tensor([-0.4, -0.1]))
    table = cost_table(teacher, space, (8, 8), 5)
    router.costs.copy_(table.ratio(router.harden(router.code_gates(router.codes))))
    budget = float(router.costs.mean())
    return SharingStage(copy.deepcopy(teacher), teacher, space, router, SCHEDULER, CONFIG, budget, table, **options)


def a_batch(count: int = 8, seed: int = 0) -> Batch:
    noise = torch.Generator().manual_seed(seed)
    shapes = ((count, 4, 8, 8), (count, 5, 24), (count, 16))
    latents, texts, embeddings = (torch.randn(shape, generator=noise) for shape in shapes)
    return Batch(latents, texts, embeddings, torch.arange(count) + 100 * seed)


def train(stage: SharingStage, steps: range, optimizer: torch.optim.Optimizer) -> None:
    for step in steps:
        batch = a_batch(seed=step)
        optimizer.zero_grad()
        stage(batch, noise=Noise(0, step, batch.rows)).total.backward()
        optimizer.step()


def trained(stage: SharingStage) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


def error_of(stage: SharingStage, code: int) -> float:
    """Of the network that would be cut out now, on a batch of its own."""
    batch = a_batch(32, seed=77)
    cut = slice_unet(stage.distillation.expert, stage.router.architecture_codes()[code])
    t = torch.full((32,), 500)
    with torch.no_grad():
        answers = [unet(batch.latents, t, batch.text_states).sample for unet in (cut, stage.distillation.teacher)]
    return float((answers[0] - answers[1]).square().mean())


def test_every_code_gets_better_and_only_the_student_learns():
    stage = a_stage()
    before = [error_of(stage, code) for code in range(2)]
    frozen = copy.deepcopy({**stage.distillation.teacher.state_dict(), "codes": stage.router.codes.detach()})
    train(stage, range(30), trained(stage))
    after_training = [error_of(stage, code) for code in range(2)]
    assert all(now < 0.95 * then for now, then in zip(after_training, before, strict=True)), (before, after_training)
    after = {**stage.distillation.teacher.state_dict(), "codes": stage.router.codes.detach()}
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


def test_a_row_trains_under_the_code_of_its_route():
    """By similarity no row is explored: the loss is that of the masks of the routes, computed here."""
    stage, batch = a_stage("similarity"), a_batch()
    noise = Noise(0, 3, batch.rows)
    found = stage(batch, noise=noise).total
    codes = torch.stack([code.mask for code in stage.router.architecture_codes()])
    with gated(stage.distillation.expert, stage.space) as gates:
        gates.set(codes[stage.router.route_embeddings(batch.embeddings).indices])
        expected = stage.distillation(batch, noise=noise).total
    assert torch.equal(found, expected)


def test_the_router_follows_what_training_measures():
    stage = a_stage()
    train(stage, range(12), trained(stage))
    assert stage.memory is not None
    assert int(stage.memory.count) == 12 * 8
    assert stage.router.price >= 0
    fresh = a_batch(64, seed=5).embeddings
    predicted, measured = stage.router.need(fresh).mean(0), torch.tensor([error_of(stage, code) for code in range(2)])
    assert (predicted.argmin() == measured.argmin()).item()


def test_sizes_follow_what_prompts_lose_while_weights_train():
    """Errors that are known: prompts of the first kind lose a tenth of what the others lose at the same cost."""
    stage = a_stage(resize_until=60, exploration=0.3, refit_every=4)
    stage.budget = 0.6
    set_sizes(stage.router, stage.table, torch.tensor([0.57, 0.63]))
    measure, assign, seen = stage.distillation.measure, stage._assign, {}

    def assigned(batch, noise):
        seen["codes"] = assign(batch, noise)
        return seen["codes"]

    def known(batch, noise, gather):
        terms, _, times = measure(batch, noise, gather)
        need = torch.where(batch.embeddings[:, 0] > 0, 1.0, 0.1)
        return terms, need * torch.exp(-8 * stage.router.costs[seen["codes"]]), times

    stage._assign, stage.distillation.measure = assigned, known
    with torch.no_grad():
        for step in range(60):
            batch = a_batch(seed=step)
            batch.embeddings[:, 0] = 4.0 * batch.embeddings[:, 0].sign()
            stage(batch, noise=Noise(0, step, batch.rows))
    small, large = stage.router.costs.sort().values
    assert large - small > 0.15, stage.router.costs  # ln(10) / 8 would be best
    assert small < 0.6 < large
    masks = torch.stack([code.mask for code in stage.router.architecture_codes()])
    assert torch.equal(stage.codes, masks)
    assert torch.allclose(stage.table.ratio(masks), stage.router.costs)


def test_four_steps_are_two_and_a_resumption_and_two():
    through, other = a_stage(), a_stage(seed=1)
    optimizer = trained(through)
    train(through, range(2), optimizer)
    state, moments = copy.deepcopy((through.learned_state(), optimizer.state_dict()))
    train(through, range(2, 4), optimizer)
    after = a_stage()
    after.load_learned_state(state)
    resumed = trained(after)
    resumed.load_state_dict(moments)
    train(after, range(2, 4), resumed)
    for name, value in through.learned_state().items():
        assert torch.equal(value, after.learned_state()[name]), name
    with pytest.raises(ValueError, match="learned state differs"):
        other.load_learned_state({})
