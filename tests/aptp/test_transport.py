# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from aptp.transport import balanced_assignment


def similarities(batch: int, codes: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, codes, generator=torch.Generator().manual_seed(seed))


def test_the_marginals_hold():
    plan = balanced_assignment(similarities(64, 8), iterations=200).plan
    assert torch.allclose(plan.sum(1), torch.full((64,), 1 / 64), atol=1e-5)
    assert torch.allclose(plan.sum(0), torch.full((8,), 1 / 8), atol=1e-4)


def test_marginals_may_be_given():
    shares = torch.tensor([0.5, 0.25, 0.25])
    plan = balanced_assignment(similarities(64, 3), marginals=shares).plan
    assert torch.allclose(plan.sum(0), shares, atol=1e-3)


def test_three_iterations_are_the_official_ones():
    """The authors' (SwAV's) in float64 exponentials: codes to 1/K, prompts to 1/B, three times."""
    scores = similarities(32, 4)
    plan = torch.exp(scores.double() / 0.05)
    plan /= plan.sum()
    for _ in range(3):
        plan /= 4 * plan.sum(0)
        plan /= 32 * plan.sum(1, keepdim=True)
    ours = balanced_assignment(scores, epsilon=0.05, iterations=3)
    torch.testing.assert_close(ours.plan.double(), plan, atol=1e-7, rtol=1e-4)
    assert torch.equal(ours.indices, plan.argmax(1))


def test_small_epsilon_gives_the_exact_assignment():
    for seed in range(3):
        scores = similarities(24, 4, seed)
        rows, columns = linear_sum_assignment(scores.repeat_interleave(6, dim=1).numpy(), maximize=True)
        ours = balanced_assignment(scores, epsilon=0.002, iterations=5000).indices
        assert (ours.numpy() == columns[rows.argsort()] // 6).mean() > 0.95
        assert torch.bincount(ours, minlength=4).tolist() == [6, 6, 6, 6]


def test_a_prompts_code_is_the_plans_largest_entry():
    transport = balanced_assignment(similarities(32, 4))
    assert torch.equal(transport.indices, transport.plan.argmax(1))


def test_potentials_from_everybody_assign_each_workers_rows():
    scores = similarities(32, 4)
    transport = balanced_assignment(scores)
    parts = [(rows + transport.potentials).argmax(1) for rows in scores.split(8)]
    assert torch.equal(torch.cat(parts), transport.indices)


def test_half_precision_input_and_large_values_do_not_overflow():
    scores = similarities(32, 4)
    half = balanced_assignment(scores.to(torch.bfloat16), epsilon=0.01)
    full = balanced_assignment(scores.to(torch.bfloat16).float(), epsilon=0.01)
    assert torch.equal(half.plan, full.plan)
    assert torch.isfinite(balanced_assignment(1000 * scores, epsilon=0.01).plan).all()


def test_a_code_that_is_everybodys_favourite_still_gets_only_its_share():
    scores = similarities(40, 4) * 0.1
    scores[:, 2] += 5
    assert torch.bincount(scores.argmax(1), minlength=4).tolist() == [0, 0, 40, 0]
    assert torch.bincount(balanced_assignment(scores, epsilon=0.01).indices, minlength=4).max() <= 13


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        (torch.ones(4, 2), {"epsilon": 0.0}, "must be positive"),
        (torch.full((4, 2), torch.nan), {}, "must be finite"),
        (torch.ones(4, 2), {"marginals": torch.tensor([1.0, 0.0])}, "positive shares"),
        (torch.ones(4, 2), {"marginals": torch.tensor([0.7, 0.7])}, "sum to 1"),
    ],
)
def test_illegal_input_is_refused(scores, options, words):
    with pytest.raises(ValueError, match=words):
        balanced_assignment(scores, **options)
