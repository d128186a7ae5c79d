# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import pytest
import torch

from aptp.baselines import (
    block_removal_code,
    magnitude_code,
    random_code,
    random_routing,
    uniform_code,
    unit_magnitudes,
)
from aptp.cost import cost_table, count_macs
from aptp.sites import read_space
from aptp.slicing import slice_unet
from tests.support import tiny

UNET = tiny.unet()
SPACE = read_space(UNET)
TABLE = cost_table(UNET, SPACE, (8, 8), 5)
BASELINES = {
    "uniform": lambda budget: uniform_code(UNET, SPACE, TABLE, budget),
    "magnitude": lambda budget: magnitude_code(UNET, SPACE, TABLE, budget),
    "random": lambda budget: random_code(SPACE, TABLE, budget, generator=torch.Generator().manual_seed(0)),
    "blocks": lambda budget: block_removal_code(UNET, SPACE, TABLE, budget),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("budget", [0.55, 0.7, 0.9, 1.0])
def test_every_baseline_meets_the_budget_and_is_cut_as_it_says(name, budget):
    code = BASELINES[name](budget)
    assert TABLE.ratio(code.mask[None]).item() == pytest.approx(budget, rel=0.02)
    assert count_macs(slice_unet(UNET, code), (8, 8), 5) == int(TABLE.macs(code.mask[None]))


@pytest.mark.parametrize("name", BASELINES)
def test_a_budget_below_what_the_space_reaches_is_refused(name):
    with pytest.raises(ValueError, match="outside"):
        BASELINES[name](TABLE.minimum / 2)


@pytest.mark.parametrize("name", ["uniform", "random"])
def test_uniform_and_random_thin_every_site_alike(name):
    code = BASELINES[name](0.7)
    shares = torch.tensor([len(code.kept_units(site.name)) / site.units for site in SPACE.width if site.units >= 8])
    assert shares.max() - shares.min() <= 0.13
    assert not any(code.drops(site.name) for site in SPACE.depth)


def test_magnitudes_are_of_all_weights_that_go_with_a_unit():
    """By hand: zeroing a unit's weights everywhere takes away exactly its square from the network's."""
    unet = tiny.unet()
    site = next(site for site in SPACE.width if site.kind == "hidden")
    feed_forward = unet.get_submodule(site.name.removesuffix(".net.2"))
    unit = slice(3 * site.channels_per_unit, 4 * site.channels_per_unit)
    up, down = feed_forward.net[0].proj.weight, feed_forward.net[2].weight
    square = up[unit].square().sum() + up[site.channels :][unit].square().sum() + down[:, unit].square().sum()
    scores = unit_magnitudes(unet, SPACE)[SPACE.slice_of(site.name)]
    whole = [
        up[u].square().sum() + up[site.channels :][u].square().sum() + down[:, u].square().sum()
        for u in (slice(i * site.channels_per_unit, (i + 1) * site.channels_per_unit) for i in range(site.units))
    ]
    mean = torch.stack(whole).sqrt().mean()
    assert scores[3].item() == pytest.approx((square.sqrt() / mean).item(), rel=1e-4)
    assert scores.mean().item() == pytest.approx(1, rel=1e-5)


def test_magnitude_keeps_the_heavy_units():
    unet = tiny.unet()
    site = next(site for site in SPACE.width if site.kind == "hidden")
    with torch.no_grad():
        unet.get_submodule(site.name).weight[:, : site.channels_per_unit] *= 100
    code = magnitude_code(unet, SPACE, TABLE, 0.5)
    assert 0 in code.kept_units(site.name).tolist()


def test_blocks_go_in_the_keep_orders_reverse():
    code = block_removal_code(UNET, SPACE, TABLE, 0.6)
    kept = [not code.drops(SPACE.depth[index].name) for index in SPACE.keep_order]
    assert kept == sorted(kept, reverse=True)
    assert not all(kept)


def test_random_routing_keeps_the_usage_and_breaks_the_match():
    routes = torch.arange(1000) % 4
    dealt = random_routing(routes, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.bincount(dealt), torch.bincount(routes))
    assert (dealt == routes).float().mean().item() == pytest.approx(0.25, abs=0.05)
