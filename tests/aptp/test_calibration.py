# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import math
from dataclasses import replace

import pytest
import torch

from aptp import calibration
from aptp.calibration import calibrate_budget, set_price
from aptp.codes import PruningSpace
from aptp.cost import CostTable, cost_table
from aptp.need import NeedConfig, NeedHead, Observations
from aptp.router import Router
from aptp.routes import RouterConfig, UnusedCodeError
from aptp.sites import read_space
from aptp.sizes import set_sizes
from tests.support import tiny


@pytest.fixture(scope="module")
def space() -> PruningSpace:
    return read_space(tiny.unet())


@pytest.fixture(scope="module")
def table(space) -> CostTable:
    return cost_table(tiny.unet(), space, (8, 8), 5)


def a_router(space, **options) -> Router:
    config = replace(RouterConfig(3, 16, routing="similarity"), **options)
    return Router(space, config, generator=torch.Generator().manual_seed(0))


def embeddings(count: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("balance", [0.0, math.inf])
@pytest.mark.parametrize("budget", [0.45, 0.6, 0.85])
def test_calibration_meets_the_budget_on_the_prompts_as_routed(space, table, budget, balance):
    z = embeddings(400)
    router = a_router(space, initial_spread=0.6)
    router.centre_embeddings(z)
    found = calibrate_budget(router, z, table, budget, balance=balance)
    codes = torch.stack([code.mask for code in router.architecture_codes()])
    routed = table.ratio(codes)[router.route_embeddings(z).indices].mean().item()
    assert routed == pytest.approx(budget, rel=0.01)
    assert found.ratio == pytest.approx(routed, rel=1e-4)
    assert sum(found.usage) == pytest.approx(1)
    if balance:
        assert min(found.usage) > 0.5 / 3


def test_calibration_moves_nothing_when_the_budget_is_met(space, table):
    z = embeddings(100)
    router = a_router(space, initial_spread=0.6)
    first = calibrate_budget(router, z, table, 0.6)
    codes = router.architecture_codes()
    second = calibrate_budget(router, z, table, first.ratio)
    assert (second.width_shift, second.depth_shift) == (first.width_shift, first.depth_shift)
    assert router.architecture_codes() == codes


@pytest.mark.parametrize(("above", "num_codes"), [(1.0, 1), (1.08, 3)])
def test_calibration_lets_depth_go_where_width_does_not_suffice(space, table, above, num_codes):
    """Down to the least budget, where all codes are one and the depth site that is kept longest still stands."""
    z = embeddings(100)
    router = a_router(space, num_codes=num_codes)
    found = calibrate_budget(router, z, table, table.minimum * above, tolerance=0.05)
    assert found.depth_shift < 0
    assert not any(code.drops(space.depth[space.keep_order[0]].name) for code in router.architecture_codes())
    assert found.ratio == pytest.approx(table.minimum * above, rel=0.05)


def test_calibration_stays_near_what_was_learned(space, table):
    """Far away the first code, which has no depth, costs the budget while the second is whole and too dear for all."""
    z, router = embeddings(100), a_router(space, num_codes=2, routing="need", initial_logit=-3.0)
    entries = space.width_entries
    with torch.no_grad():
        router.codes[0, entries:] = torch.tensor([10.0, *[-10.0] * (len(space.depth) - 1)]).flip(0)
    set_sizes(router, table, torch.tensor([0.75, 0.78]))
    router.need.levels.copy_(torch.tensor([0.81, 0.01]).log())
    largest = float(table.ratio(router.harden(router.code_gates(router.codes + 30)))[0])
    router.price.fill_(8.0)
    before = float(table.ratio(router.harden(router.code_gates(router.codes)))[1])
    budget = before * 1.02
    assert largest < budget
    found = calibrate_budget(router, z, table, budget, allow_unused=True)
    assert found.usage == (0.0, 1.0)
    assert abs(found.width_shift) < 0.2
    assert found.depth_shift == 0


def test_calibration_leaves_sizes_as_they_were_where_a_price_is_enough(space, table, monkeypatch):
    """At a price of 9 all prompts take the smallest code, which is too small to cost the budget soon."""
    monkeypatch.setattr(calibration, "_NEAR", 0.01)
    z = embeddings(300)
    router = a_router_by_need(space, table, z)
    router.price.fill_(9.0)
    codes, budget = router.architecture_codes(), float(router.costs.min() + 3 * router.costs.max()) / 4
    found = calibrate_budget(router, z, table, budget, allow_unused=True)
    assert abs(found.ratio_before / budget - 1) > 0.02
    assert found.ratio == pytest.approx(budget, rel=0.01)
    assert router.architecture_codes() == codes
    assert router.price < 9


def test_each_code_can_be_given_a_size(space, table):
    router, wanted = a_router(space, initial_spread=0.6), torch.tensor([0.45, 0.6, 0.8])
    set_sizes(router, table, wanted)
    costs = table.ratio(torch.stack([code.mask for code in router.architecture_codes()]))
    assert torch.allclose(costs, wanted, atol=0.02)
    assert torch.equal(router.costs, costs)


def test_impossible_budgets_and_unused_codes_are_refused(space, table):
    z, router = embeddings(100), a_router(space)
    with pytest.raises(ValueError, match="budget must lie in"):
        calibrate_budget(router, z, table, table.minimum / 2)
    with pytest.raises(UnusedCodeError, match="of 3"):
        calibrate_budget(router, z[:2], table, 0.7, tolerance=1.0)


def a_router_by_need(space, table, z) -> Router:
    """Codes of three sizes; a prompt's loss falls with cost fast or hardly, as its first coordinate tells."""
    need = NeedHead(3, 16, NeedConfig(length=1.0, noise=0.01, enough=1))
    router = a_router(space, routing="need")
    router.need = need
    router.offsets.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    router.costs.copy_(table.ratio(router.harden(router.code_gates(router.codes))))
    steep = (z[:, :1] > 0).float() + 0.1
    errors = torch.exp(-4 * steep * router.costs)
    codes = torch.arange(3).repeat(len(z))
    need.observe(Observations(z.repeat_interleave(3, 0), codes, torch.full((3 * len(z),), 0.5), errors.flatten()))
    return router


def test_a_price_meets_the_budget_and_no_other_use_of_the_codes_loses_less(space, table):
    z = embeddings(300)
    router = a_router_by_need(space, table, z)
    cheapest, dearest = router.costs.min().item(), router.costs.max().item()
    budget = (cheapest + dearest) / 2
    usage = set_price(router, z, budget)
    routes = router.route_embeddings(z)
    assert float((usage * router.costs).sum()) == pytest.approx(budget, rel=0.01)
    spent, lost = router.costs[routes.indices].sum(), routes.losses.gather(1, routes.indices[:, None]).sum()
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = torch.where(
            torch.rand(300, generator=generator) < 0.1, torch.randint(3, (300,), generator=generator), routes.indices
        )
        if router.costs[other].sum() <= spent:
            assert routes.losses.gather(1, other[:, None]).sum() >= lost - 1e-4
    with pytest.raises(ValueError, match="no price makes these 300 prompts"):
        set_price(router, z, cheapest / 2)
    with pytest.raises(ValueError, match="routes by similarity"):
        set_price(a_router(space), z, budget)


def test_the_price_is_a_dial_from_best_to_cheapest(space, table):
    z = embeddings(100)
    router = a_router_by_need(space, table, z)
    costs = [
        float(router.costs[router.route_embeddings(z, price=p).indices].mean()) for p in (0.0, 0.1, 1.0, 10.0, math.inf)
    ]
    assert costs == sorted(costs, reverse=True)
    best = router.route_embeddings(z, price=0.0)
    assert torch.equal(best.indices, best.losses.argmin(1))
    assert costs[-1] == pytest.approx(router.costs.min().item())
    with pytest.raises(ValueError, match="must not be negative"):
        router.route_embeddings(z, price=-1.0)
