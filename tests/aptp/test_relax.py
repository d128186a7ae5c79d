# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import math

import pytest
import torch

from aptp.noise import Noise
from aptp.relax import Relaxation, depth_gates, harden, soft_gates, width_gates

PAPER = Relaxation()


def test_width_gates_follow_the_formula():
    z, g = torch.tensor([[-3.0, 0.0, -2.0]]), torch.tensor([[0.0, 0.0, 0.5]])
    expected = [0.5, 1 / (1 + math.exp(-3 / 0.4)), 1 / (1 + math.exp(-1.5 / 0.4))]
    assert width_gates(z, g, PAPER)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("z", "probability"), [(-2.0, 0.934), (-3.0, 0.632), (-4.0, 0.308)])
def test_a_gate_is_on_with_the_probability_of_one_sided_gumbel_noise(z, probability):
    noise = Noise(0, 0, torch.tensor([7])).gumbel(200_000, use="gates")
    on = width_gates(torch.full_like(noise, z), noise, PAPER) >= 0.5
    assert on.float().mean().item() == pytest.approx(probability, abs=0.005)


def slow_depth_gates(z, order):
    """The formula word by word in float64, one gate after the other."""
    s = torch.softmax(z.double(), dim=0)
    gates = [0.0] * len(z)
    for k, slot in enumerate(order):
        x = min(max(float(s[: len(z) - k].sum()), 1e-6), 1 - 1e-6)
        gates[slot] = 1 / (1 + math.exp(-(math.log(x / (1 - x)) + 3) / 0.4))
    return gates


def test_ordered_depth_gates_agree_with_the_slow_reference():
    order = [3, 0, 4, 1, 2]
    for seed in range(5):
        z = 4 * torch.randn(5, generator=torch.Generator().manual_seed(seed))
        ours = depth_gates(z[None], None, torch.tensor(order), PAPER)[0]
        assert ours.tolist() == pytest.approx(slow_depth_gates(z, order), abs=1e-5)


def test_ordered_depth_gates_fall_along_the_order_and_the_first_never_goes():
    order = torch.tensor([2, 0, 1, 3])
    gates = depth_gates(5 * torch.randn(50, 4), None, order, PAPER)[:, order]
    assert (gates.diff(dim=1) <= 0).all()
    assert (gates[:, 0] > 0.99).all()


def test_depth_gates_are_finite_in_half_precision_and_have_a_gradient():
    z = torch.tensor([[9.0, -9.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    gates = depth_gates(z, None, torch.tensor([0, 1, 2]), PAPER)
    gates.sum().backward()
    assert gates.dtype == torch.float32
    assert torch.isfinite(z.grad).all()


def test_without_an_order_depth_gates_are_free():
    z = torch.randn(3, 4)
    assert torch.equal(depth_gates(z, None, None, PAPER), width_gates(z, None, PAPER))


def test_a_space_without_depth_has_no_depth_gates():
    z = torch.randn(3, 4)
    empty = torch.zeros(0, dtype=torch.long)
    assert torch.equal(soft_gates(z, None, 4, empty, PAPER), width_gates(z, None, PAPER))


def test_hard_gates_are_bits_and_a_site_keeps_its_best_unit():
    soft = torch.tensor([[0.9, 0.1, 0.2, 0.4, 0.3, 0.2]])
    hard = harden(soft, torch.tensor([0, 0, 1, 1, 1]))  # the last entry is a depth gate, and may go
    assert hard.tolist() == [[1, 0, 0, 1, 0, 0]]


def test_hardening_passes_the_gradient_straight_through():
    soft = torch.tensor([[0.9, 0.1, 0.4]], requires_grad=True)
    weight = torch.tensor([[1.0, -2.0, 3.0]])
    (harden(soft, torch.tensor([0, 0])) * weight).sum().backward()
    assert torch.equal(soft.grad, weight)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive"):
        Relaxation(temperature=0.0)
