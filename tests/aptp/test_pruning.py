# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aptp.baselines import magnitude_code, random_code, uniform_code
from aptp.calibration import calibrate_budget
from aptp.codes import PruningSpace
from aptp.cost import CostTable, cost_table
from aptp.gates import gated
from aptp.latents import Batch
from aptp.losses import NoiseSchedule, output_loss
from aptp.metrics import paired_denoising_loss
from aptp.need import NeedConfig
from aptp.noise import Noise, sample_noise
from aptp.objectives import PruningConfig
from aptp.pruning import PruningStage
from aptp.sites import read_space
from tests.support import tiny
from tests.support.tiny_stage import SCHEDULER, STEADY, a_batch, a_stage, run


@pytest.fixture(scope="module")
def unet():
    return tiny.unet()


@pytest.fixture(scope="module")
def space(unet) -> PruningSpace:
    return read_space(unet)


@pytest.fixture(scope="module")
def table(unet, space) -> CostTable:
    return cost_table(unet, space, (8, 8), 5)


def train(stage: PruningStage, steps: range, optimizer, batch: Batch) -> list[float]:
    ratios = []
    for step in steps:
        loss = run(stage, batch, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        ratios.append(float(loss.metrics["ratio"]))
    return ratios


@pytest.mark.parametrize("resource", ["price", "log"])
def test_what_sizes_are_worth_beside_their_price_reaches_them(unet, space, table, resource):
    stage = a_stage(unet, space, table, replace(STEADY, resource=resource))
    found = run(stage, a_batch())
    for name in ("spread", "largest"):
        (gradient,) = torch.autograd.grad(found.terms[name], [stage.router.codes], retain_graph=True)
        assert gradient.abs().max() > 0, name


def test_every_gate_of_a_used_code_gets_a_task_gradient_and_the_unet_none(unet, space, table):
    stage = a_stage(unet, space, table, routing="similarity")  # no prompt is there only to be measured
    mask = torch.full((4, len(space)), 0.8, requires_grad=True)
    stage._denoise(a_batch(4), mask, Noise(0, 0, torch.arange(4)))[0]["denoising"].backward()
    assert (mask.grad != 0).all()

    loss = run(stage, a_batch(16))
    (loss.terms["denoising"] + loss.terms["output"]).backward()
    used = loss.metrics["trained"] > 0
    assert (stage.router.codes.grad[used] != 0).float().mean() > 0.9
    assert (stage.router.codes.grad[~used] == 0).all()
    assert stage.router.predictor.linear.weight.grad is None
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert {name for name, p in stage.named_parameters() if p.requires_grad} == {
        "router.codes",
        "router.predictor.linear.weight",
        "router.predictor.linear.bias",
    }


def test_in_the_warm_up_the_task_reaches_the_predictor_and_not_the_codes(unet, space, table):
    stage = a_stage(unet, space, table, PruningConfig(warmup_steps=5, warmup="prompts"))
    loss = run(stage, a_batch(), step=4)
    (loss.terms["denoising"] + loss.terms["resource"]).backward()
    assert stage.router.codes.grad is None
    assert stage.router.predictor.linear.weight.grad.abs().sum() > 0
    after = run(stage, a_batch(), step=5)
    after.terms["denoising"].backward()
    assert stage.router.codes.grad.abs().sum() > 0


def test_the_pull_and_the_contrastive_term_reach_the_predictor_alone(unet, space, table):
    stage = a_stage(unet, space, table)
    loss = run(stage, a_batch())
    (loss.terms["pull"] + loss.terms["contrastive"]).backward()
    assert stage.router.predictor.linear.weight.grad.abs().sum() > 0
    assert stage.router.codes.grad is None


def test_open_gates_make_the_student_the_teacher(unet, space, table):
    config = PruningConfig(warmup_steps=0, size_span=0.0)
    stage = a_stage(unet, space, table, config, initial_logit=20.0, initial_depth=40.0)
    loss = run(stage, a_batch())
    assert loss.terms["output"].item() < 1e-8
    assert loss.terms["feature"].item() < 1e-8
    assert loss.metrics["ratio"].item() == pytest.approx(1)


@pytest.mark.parametrize("start", [-1.0, -4.5])
def test_the_log_resource_term_moves_the_ratio_to_the_budget_from_both_sides(unet, space, table, start):
    config = PruningConfig(budget=0.6, warmup_steps=0, size_span=0.0, resource="log")
    stage = a_stage(unet, space, table, config, initial_logit=start)
    nothing = torch.zeros(32)
    stage._denoise = lambda batch, mask, noise, gather: ({}, nothing, nothing, nothing)  # the budget alone
    optimizer = torch.optim.AdamW(stage.router.parameters(), lr=0.1, weight_decay=0.0)
    ratios = train(stage, range(60), optimizer, a_batch(32))
    assert abs(ratios[0] - 0.6) > 0.1
    assert ratios[-1] == pytest.approx(0.6, rel=0.05)


@pytest.mark.parametrize(
    "config",
    [
        STEADY,
        PruningConfig.paper(),
        PruningConfig(warmup_steps=0, forward_gates="hard"),
        PruningConfig(warmup_steps=0, feature_weight=0.0),
    ],
)
@pytest.mark.parametrize("num_codes", [1, 3])
def test_every_option_gives_finite_terms_and_gradients(unet, space, table, config, num_codes):
    stage = a_stage(unet, space, table, config, num_codes=num_codes)
    loss = run(stage, a_batch(4), step=1000)
    loss.total.backward()
    assert all(torch.isfinite(term) for term in loss.terms.values())
    assert all(torch.isfinite(parameter.grad).all() for parameter in stage.router.parameters())
    assert set(loss.weights) == set(loss.terms) - {"denoising"}


def test_a_short_run_finds_better_codes_than_those_that_are_not_learned(space, table):
    """Six captions, six noisy patterns; a network that has learned them; 100 steps of stage 1 with 8 prompts each."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.nn.functional.interpolate(torch.randn(6, 4, 4, 4, generator=generator), size=(8, 8))
    texts, embeddings = torch.randn(6, 5, 24, generator=generator), torch.randn(6, 16, generator=generator)

    def draw(count: int) -> Batch:
        kind = torch.randint(6, (count,), generator=generator)
        noise = [0.3 * torch.randn(count, *like.shape[1:], generator=generator) for like in (patterns, embeddings)]
        rows = torch.randint(2**62, (count,), generator=generator)
        return Batch(patterns[kind] + noise[0], texts[kind], embeddings[kind] + noise[1], rows)

    unet, schedule = tiny.unet(), NoiseSchedule(SCHEDULER)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(150):
        batch = draw(8)
        noise, t = sample_noise(batch.latents, len(schedule), Noise(0, 0, batch.rows))
        prediction = unet(schedule.noisy(batch.latents, noise, t), t, batch.text_states).sample
        optimizer.zero_grad()
        output_loss(prediction, schedule.target(batch.latents, noise, t)).backward()
        optimizer.step()

    held_out = draw(128)
    noise, t = sample_noise(held_out.latents, len(schedule), Noise(0, 0, held_out.rows))

    def loss_of(masks: torch.Tensor) -> float:
        with gated(unet, space) as gates:
            gates.set(masks)
            losses = paired_denoising_loss(unet, schedule, held_out.latents, held_out.text_states, noise, t)
        return float(losses.mean())

    stage = a_stage(unet, space, table)
    optimizer = torch.optim.AdamW(stage.router.parameters(), lr=0.03, weight_decay=0.0)
    for step in range(100):
        optimizer.zero_grad()
        run(stage, draw(8), step).total.backward()
        optimizer.step()
    calibrate_budget(stage.router, held_out.embeddings, table, 0.6, tolerance=0.02, allow_unused=True)
    codes = torch.stack([code.mask for code in stage.router.architecture_codes()])
    learned = loss_of(codes[stage.router.route_embeddings(held_out.embeddings).indices])
    whole = loss_of(torch.ones(1, len(space)))
    for other in (
        uniform_code(unet, space, table, 0.6),
        magnitude_code(unet, space, table, 0.6),
        random_code(space, table, 0.6, generator=generator),
    ):
        assert learned - whole < 0.5 * (loss_of(other.mask[None]) - whole)


def test_a_step_is_a_function_of_its_number_and_its_rows(unet, space, table):
    first, again = (run(a_stage(unet, space, table), a_batch(), step=3).scalars() for _ in range(2))
    assert first == again


KINDS = 6


def planted(space, table, unet, seed: int, *, against_similarity: bool) -> dict[str, torch.Tensor]:
    """Stage 1 where the odd ones of six kinds of prompts need nothing: their student is the teacher whatever the code.

    against_similarity: each kind that needs nothing looks like one that needs all, and unlike the others of its sort.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(KINDS, 16, generator=generator)
    if against_similarity:
        centres = centres[::2].repeat_interleave(2, 0) + 0.35 * torch.randn(KINDS, 16, generator=generator)
    patterns, texts = torch.randn(KINDS, 4, 8, 8, generator=generator), torch.randn(KINDS, 5, 24, generator=generator)

    def draw(count: int) -> Batch:
        kind = torch.arange(count) % KINDS
        seen = 0.05 * torch.randn(count, 16, generator=generator)
        ids = torch.randint(2**40, (count,), generator=generator) * KINDS + kind
        return Batch(patterns[kind], texts[kind], centres[kind] + seen, ids)

    config = PruningConfig(budget=0.6, warmup_steps=20, exploration=0.2, size_span=0.3, feature_weight=0.0)
    need = NeedConfig(length=0.5, noise=0.3, memory=360, enough=96)
    stage = a_stage(unet, space, table, config, seed, num_codes=2, need=need)
    denoise = stage._denoise

    def partly(batch, mask, noise, gather):
        return denoise(batch, torch.where((batch.rows % KINDS % 2 == 1)[:, None], 1.0, mask), noise, gather)

    stage._denoise = partly  # type: ignore[method-assign, assignment]
    optimizer = torch.optim.AdamW(stage.router.parameters(), lr=0.03, weight_decay=0.0)
    for step in range(80):
        optimizer.zero_grad()
        run(stage, draw(12), step).total.backward()
        optimizer.step()
    fresh = draw(240)
    found = calibrate_budget(stage.router, fresh.embeddings, table, 0.6, allow_unused=True)
    assert found.ratio == pytest.approx(0.6, rel=0.01)
    costs = stage.router.costs[stage.router.route_embeddings(fresh.embeddings).indices]
    return {"costs": stage.router.costs, "by kind": torch.stack([costs[kind::KINDS].mean() for kind in range(KINDS)])}


@pytest.mark.parametrize("against_similarity", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_capacity_goes_to_the_prompts_that_need_it(unet, space, table, seed, against_similarity):
    found = planted(space, table, unet, seed, against_similarity=against_similarity)
    needy, needless = found["by kind"][::2], found["by kind"][1::2]
    assert (needless < found["costs"].min() + 0.02).all(), found
    assert needy.mean() > 0.62, found


@pytest.mark.parametrize("routing", ["need", "similarity"])
def test_one_code_is_the_single_code_method(unet, space, table, routing):
    """Every row trains the one code, whatever the rule of routing; what is left is task and price, computed here."""
    config = PruningConfig(budget=0.6, warmup_steps=0, contrastive_weight=0.0, exploration=0.5)
    stage = a_stage(unet, space, table, config, num_codes=1, routing=routing, need=NeedConfig(memory=32, enough=8))
    batch = a_batch()
    for step in range(3):  # the need head has enough, rows are explored
        found = run(stage, batch, step)
    stage.router.zero_grad()
    price, noise = stage.price.multiplier.clone(), Noise(0, 3, batch.rows)
    as_cut = table.ratio(stage.router.harden(stage.router.code_gates(stage.router.codes)))[0].detach()
    offsets = stage.router.offsets.clone()
    found = run(stage, batch, 3)
    found.total.backward()
    gradient = stage.router.codes.grad.clone()
    stage.router.offsets.copy_(offsets)  # the step has moved them for the next one
    assert found.metrics["trained"].tolist() == [1.0]
    assert found.terms["pull"] == 0

    stage.price.multiplier.copy_(price)
    gumbel = noise.of(torch.arange(1)).gumbel(stage.router.codes.shape[1], use="codes")
    sampled = stage.router.code_gates(stage.router.codes, gumbel)
    terms, *_ = stage._denoise(batch, sampled.expand(len(batch.latents), -1), noise)
    weights = {"denoising": 1.0, "output": config.output_weight, "feature": config.feature_weight}
    (trained,) = table.ratio(sampled)
    paid = stage._pay(as_cut + trained - trained.detach(), 3)
    expected = sum(weights[name] * term for name, term in terms.items()) + paid
    (own,) = torch.autograd.grad(expected, [stage.router.codes])
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, own, rtol=1e-3, atol=1e-7)


def test_four_steps_are_two_and_a_resumption_and_two(unet, space, table):
    def new(seed=0):
        stage = a_stage(unet, space, table, PruningConfig(warmup_steps=1), seed, need=NeedConfig(memory=32, enough=8))
        return stage, torch.optim.AdamW(stage.router.parameters(), lr=0.05)

    batch = a_batch()
    through, optimizer = new()
    train(through, range(4), optimizer, batch)

    before, optimizer = new()
    train(before, range(2), optimizer, batch)
    state = copy.deepcopy((before.learned_state(), optimizer.state_dict()))
    after, optimizer = new(seed=1)
    after.load_learned_state(state[0])
    optimizer.load_state_dict(state[1])
    train(after, range(2, 4), optimizer, batch)
    for name, value in through.learned_state().items():
        assert torch.equal(value, after.learned_state()[name]), name
    assert not any(name.startswith("unet") for name in through.learned_state())
    shapes = {name: value.shape for name, value in new()[0].learned_state().items()}
    assert {name: value.shape for name, value in through.learned_state().items()} == shapes


class HostWaits(TorchDispatchMode):
    """Counts how often Python asks for a tensor's value, or for a shape that depends on values: on an accelerator each
    time waits for all that is queued."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "equal", "unique", "masked_select", "bincount")
        masked = func._opname == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += masked or any(func._opname.startswith(name) for name in waits)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_the_same_few_times_whatever_the_network():
    counts = []
    for layers in (1, 2):
        unet = tiny.unet(layers_per_block=layers)
        space = read_space(unet)
        stage = a_stage(unet, space, cost_table(unet, space, (8, 8), 5))
        with HostWaits() as waits:
            run(stage, a_batch()).total.backward()
        counts.append(waits.count)
    assert counts[0] == counts[1] <= 12  # the transport's: finite input, and convergence every tenth iteration


class Workers:
    """Threads in lockstep; the gathered rows keep every worker's graph, so the backward sums over the workers."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)
        self.rows = [torch.empty(0)] * count

    def gather(self, rank: int):
        def gather(rows: torch.Tensor) -> torch.Tensor:
            self.rows[rank] = rows
            self.barrier.wait()
            joined = torch.cat(self.rows)
            self.barrier.wait()
            return joined

        return gather


def test_two_workers_are_one_with_the_global_batch(unet, space, table):
    batch = a_batch(8)
    halves = [Batch(*(tensor[half] for tensor in vars(batch).values())) for half in (slice(0, 4), slice(4, 8))]
    whole = a_stage(unet, space, table)
    expected = run(whole, batch)
    expected.total.backward()

    workers, stages = Workers(2), [copy.deepcopy(a_stage(unet, space, table)) for _ in range(2)]
    losses = [None, None]

    def work(rank: int) -> None:
        losses[rank] = run(stages[rank], halves[rank], gather=workers.gather(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (sum(loss.total for loss in losses) / 2).backward()

    for name, term in expected.terms.items():
        mean = sum(loss.terms[name].item() for loss in losses) / 2
        assert mean == pytest.approx(term.item(), rel=1e-5, abs=1e-6), name
    for name in ("resource", "spread", "largest", "contrastive"):
        assert losses[0].terms[name].item() == losses[1].terms[name].item()
    assert torch.equal(stages[0].usage, stages[1].usage)
    assert torch.allclose(stages[0].usage, whole.usage)
    gradient = sum(stage.router.predictor.linear.weight.grad for stage in stages)
    assert torch.allclose(gradient, whole.router.predictor.linear.weight.grad, atol=1e-6, rtol=1e-3)


def test_parts_of_different_networks_and_budgets_out_of_reach_are_refused(unet, space, table):
    stage = a_stage(unet, space, table)
    with pytest.raises(ValueError, match="is below"):
        a_stage(unet, space, table, PruningConfig(budget=table.minimum / 2))
    other = read_space(tiny.unet(block_out_channels=(32, 96), attention_head_dim=(2, 3)))
    with pytest.raises(ValueError, match="router and space differ"):
        PruningStage(unet, other, table, stage.router, SCHEDULER, STEADY)
