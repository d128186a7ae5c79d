# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import pytest
import torch

from aptp.calibration import calibrate_budget
from aptp.codes import PruningSpace
from aptp.cost import CostTable, cost_table
from aptp.router import Router, RouterConfig, UnusedCodeError
from aptp.sites import read_space
from tests.support import tiny


@pytest.fixture(scope="module")
def space() -> PruningSpace:
    return read_space(tiny.unet())


@pytest.fixture(scope="module")
def table(space) -> CostTable:
    return cost_table(tiny.unet(), space, (8, 8), 5)


def a_router(space, **options) -> Router:
    config = RouterConfig(**{"num_codes": 3, "embedding_dim": 16} | options)
    return Router(space, config, generator=torch.Generator().manual_seed(0))


def embeddings(count: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("balance", [False, True])
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


@pytest.mark.parametrize(("above", "num_codes"), [(1.0, 1), (1.15, 3)])
def test_calibration_lets_depth_go_where_width_does_not_suffice(space, table, above, num_codes):
    """Down to the least budget, where all codes are one and the depth site that is kept longest still stands."""
    z = embeddings(100)
    router = a_router(space, num_codes=num_codes)
    found = calibrate_budget(router, z, table, table.minimum * above, tolerance=0.05)
    assert found.depth_shift < 0
    assert not any(code.drops(space.depth[space.keep_order[0]].name) for code in router.architecture_codes())
    assert found.ratio == pytest.approx(table.minimum * above, rel=0.05)


def test_impossible_budgets_and_unused_codes_are_refused(space, table):
    z, router = embeddings(100), a_router(space)
    with pytest.raises(ValueError, match="budget must lie in"):
        calibrate_budget(router, z, table, table.minimum / 2)
    router.bias[1] = 5.0
    with pytest.raises(UnusedCodeError, match="code 0, 2 of 3"):
        calibrate_budget(router, z, table, 0.7)
