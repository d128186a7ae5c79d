# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import math

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from aptp.transport import assign


def similarities(batch: int, codes: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, codes, generator=torch.Generator().manual_seed(seed))


def test_the_marginals_hold():
    plan = assign(similarities(64, 8), iterations=200).plan
    assert torch.allclose(plan.sum(1), torch.full((64,), 1 / 64), atol=1e-5)
    assert torch.allclose(plan.sum(0), torch.full((8,), 1 / 8), atol=1e-4)


@pytest.mark.parametrize("balance", [0.01, 0.1, 1.0])
def test_an_unequal_use_costs_what_balance_says(balance):
    """The objective in float64, word by word: no other plan with the same prompts has more of it."""
    scores = similarities(48, 4).double()
    scores[:, 0] += 0.4

    def objective(plan: torch.Tensor) -> float:
        usage = plan.sum(0)
        divergence = (usage * (4 * usage).log() - usage + 0.25).sum()
        return float((plan * scores).sum() - 0.05 * (plan * plan.log()).sum() - balance * divergence)

    ours = assign(scores, epsilon=0.05, iterations=3000, balance=balance).plan.double()
    assert torch.allclose(ours.sum(1), torch.full((48,), 1 / 48, dtype=torch.float64), atol=1e-7)
    generator = torch.Generator().manual_seed(0)
    for size in (0.003, 0.03, 0.3):
        for _ in range(30):
            other = ours * torch.exp(size * torch.randn(48, 4, generator=generator))
            other /= 48 * other.sum(1, keepdim=True)
            assert objective(other) < objective(ours)
    to_favourite = ours * torch.tensor([1.01, 1, 1, 1])
    from_favourite = ours * torch.tensor([0.99, 1, 1, 1])
    for other in (to_favourite, from_favourite):
        assert objective(other / (48 * other.sum(1, keepdim=True))) < objective(ours)


def test_balanced_plans_are_pots():
    scores = similarities(48, 4)
    pot = ot.sinkhorn(np.full(48, 1 / 48), np.full(4, 0.25), -scores.double().numpy(), 0.05, numItermax=5000)
    np.testing.assert_allclose(assign(scores, epsilon=0.05, iterations=500).plan.numpy(), pot, atol=1e-6)


def test_without_balance_every_prompt_has_its_best_code_and_with_all_of_it_equal_shares():
    scores = similarities(64, 4)
    scores[:, 0] += 2
    assert torch.equal(assign(scores, balance=0.0).indices, scores.argmax(1))
    shares = [assign(scores, epsilon=0.02, balance=balance).plan.sum(0)[0] for balance in (0.0, 0.1, 1.0, math.inf)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.25, abs=0.01)


def test_three_iterations_are_the_official_ones():
    """The authors' (SwAV's) in float64 exponentials: codes to 1/K, prompts to 1/B, three times."""
    scores = similarities(32, 4)
    plan = torch.exp(scores.double() / 0.05)
    plan /= plan.sum()
    for _ in range(3):
        plan /= 4 * plan.sum(0)
        plan /= 32 * plan.sum(1, keepdim=True)
    ours = assign(scores, epsilon=0.05, iterations=3)
    torch.testing.assert_close(ours.plan.double(), plan, atol=1e-7, rtol=1e-4)
    assert torch.equal(ours.indices, plan.argmax(1))


def test_small_epsilon_gives_the_exact_assignment():
    for seed in range(3):
        scores = similarities(24, 4, seed)
        rows, columns = linear_sum_assignment(scores.repeat_interleave(6, dim=1).numpy(), maximize=True)
        ours = assign(scores, epsilon=0.002, iterations=5000).indices
        assert (ours.numpy() == columns[rows.argsort()] // 6).mean() > 0.95
        assert torch.bincount(ours, minlength=4).tolist() == [6, 6, 6, 6]


def test_a_prompts_code_is_the_plans_largest_entry():
    transport = assign(similarities(32, 4))
    assert torch.equal(transport.indices, transport.plan.argmax(1))


def test_potentials_from_everybody_assign_each_workers_rows():
    scores = similarities(32, 4)
    transport = assign(scores)
    parts = [(rows + transport.potentials).argmax(1) for rows in scores.split(8)]
    assert torch.equal(torch.cat(parts), transport.indices)


def test_half_precision_input_and_large_values_do_not_overflow():
    scores = similarities(32, 4)
    half = assign(scores.to(torch.bfloat16), epsilon=0.01)
    full = assign(scores.to(torch.bfloat16).float(), epsilon=0.01)
    assert torch.equal(half.plan, full.plan)
    assert torch.isfinite(assign(1000 * scores, epsilon=0.01).plan).all()


def test_a_code_that_is_everybodys_favourite_still_gets_only_its_share():
    scores = similarities(40, 4) * 0.1
    scores[:, 2] += 5
    assert torch.bincount(scores.argmax(1), minlength=4).tolist() == [0, 0, 40, 0]
    assert torch.bincount(assign(scores, epsilon=0.01).indices, minlength=4).max() <= 13


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        (torch.ones(4, 2), {"epsilon": 0.0}, "must be positive"),
        (torch.full((4, 2), torch.nan), {}, "must be finite"),
        (torch.ones(4, 2), {"balance": -1.0}, "balance not negative"),
        (torch.ones(4, 2), {"balance": math.nan}, "balance not negative"),
    ],
)
def test_illegal_input_is_refused(scores, options, words):
    with pytest.raises(ValueError, match=words):
        assign(scores, **options)
