"""The slice of a code equals the gates of that code, holds the original's weights, and is a stock model."""

import copy

import pytest
import torch
import torch_pruning
from diffusers import UNet2DConditionModel
from torch import nn

from aptp.codes import ArchitectureCode
from aptp.gates import block_features, gated
from aptp.sites import offer_of, producers_of, read_space
from aptp.slicing import Skipped, slice_unet
from tests.support import tiny
from tests.support.tiny_pipeline import build_pipeline

KINDS = [("unet", kind) for kind in ("groups", "heads", "hidden", "resnet", "transformer", "all")]
KINDS += [("sdxl", "block"), ("sdxl", "all")] + [("pixart", kind) for kind in ("heads", "hidden", "block", "all")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_slice_equals_the_hard_gates(name, kind):
    model = tiny.MODELS[name]()
    space, inputs = read_space(model, depth="every"), tiny.inputs(model)
    stock = model(**inputs).sample
    for seed in range(3):
        code = tiny.random_code(space, kind, seed)
        with gated(model, space) as gates, block_features(model) as features:
            gates.set(code.mask[None])
            masked, masked_features = model(**inputs).sample, list(features)
        small = slice_unet(model, code)
        with block_features(small) as features:
            torch.testing.assert_close(small(**inputs).sample, masked, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(list(features), masked_features, atol=1e-5, rtol=1e-5)
        assert (masked - stock).abs().max() > 1e-3
    assert torch.equal(model(**inputs).sample, stock)  # the original is untouched


@torch.no_grad()
def test_each_depth_site_alone_can_be_dropped():
    model = tiny.unet()
    space, inputs = read_space(model, depth="every"), tiny.inputs(model)
    for site in space.depth:
        bits = torch.ones(len(space), dtype=torch.bool)
        bits[space.slice_of(site.name)] = False
        with gated(model, space) as gates:
            gates.set(bits.float()[None])
            masked = model(**inputs).sample
        small = slice_unet(model, ArchitectureCode(space, bits))
        assert isinstance(small.get_submodule(site.name), Skipped)
        torch.testing.assert_close(small(**inputs).sample, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_kept_weight_is_the_indexed_original(name):
    """Without the library's own indexing: every weight of the original is numbered, and the numbers must survive."""
    model = tiny.MODELS[name]()
    space = read_space(model)
    code = tiny.random_code(space)
    for parameter in model.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
    small, originals = slice_unet(model, code), dict(model.named_parameters())
    kept_entries = {site.name: set(code.kept_units(site.name).tolist()) for site in space.width}
    around = {
        f"{site.name.removesuffix(offer_of(site).consumer)}{child}": (site, role)
        for site in space.width
        for role, children in (("consumer", [offer_of(site).consumer]), ("producer", offer_of(site).producers))
        for child in children
    }
    for path, weight in small.named_parameters():
        original = originals[path]
        index = [(weight.long() // step) % size for step, size in zip(original.stride(), original.shape, strict=True)]
        site, role = around.get(path.rpartition(".")[0], (space.width[0], "untouched"))
        for axis, (found, size) in enumerate(zip(index, original.shape, strict=True)):
            cut = (role == "producer" and axis == 0) or (role == "consumer" and axis == 1)
            allowed = torch.arange(size)
            if cut:
                unit = allowed % site.channels // site.channels_per_unit
                allowed = allowed[[int(u) in kept_entries[site.name] for u in unit]]
            shape = [len(allowed) if i == axis else 1 for i in range(original.ndim)]
            assert torch.equal(found, allowed.view(shape).expand(weight.shape)), path


def test_the_sizes_the_layers_tell_are_their_real_ones():
    model = tiny.unet()
    code = tiny.random_code(read_space(model))
    small = slice_unet(model, code)
    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels) == tuple(module.weight.shape[:2])
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight)
            assert module.num_channels % module.num_groups == 0
    for site in code.space.width:
        if site.kind == "heads" and not any(site.name.startswith(f"{d.name}.") for d in code.space.depth):
            attention = small.get_submodule(site.name.removesuffix(".to_out.0"))
            assert attention.heads == attention.sliceable_head_dim == len(code.kept_units(site.name))
            assert attention.inner_dim == attention.inner_kv_dim == attention.to_q.out_features == attention.heads * 16
        if site.kind == "groups" and not any(site.name.startswith(f"{d.name}.") for d in code.space.depth):
            resnet = small.get_submodule(site.name.removesuffix(".conv2"))
            assert resnet.norm2.num_groups == len(code.kept_units(site.name))


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_the_layers_that_are_cut_are_torch_prunings_dependency_group(name):
    """DepGraph finds, by tracing autograd, every layer that must shrink with a root: it must be our group."""
    model = tiny.MODELS[name]()
    space = read_space(model, depth="none")
    names = {module: path for path, module in model.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=tiny.inputs(model), forward_fn=lambda net, kwargs: net(**kwargs).sample
    )
    first_of_kind = {site.kind: site for site in reversed(space.width)}
    for site in first_of_kind.values():
        offer = offer_of(site)
        owner = model.get_submodule(site.name.removesuffix(f".{offer.consumer}"))
        producers = producers_of(owner, offer)
        root = next(iter(producers.values()))
        prune = (
            torch_pruning.prune_conv_out_channels if site.kind == "groups" else torch_pruning.prune_linear_out_channels
        )
        group = graph.get_pruning_group(root, prune, idxs=[0])
        found = {names[dep.target.module] for dep, _ in group if dep.target.module in names}
        expected = {site.name} | {names[layer] for layer in producers.values()}
        assert {
            path for path in found if type(model.get_submodule(path)) in (nn.Linear, nn.Conv2d, nn.GroupNorm)
        } == expected


def test_only_the_kept_part_is_copied_and_nothing_is_shared():
    model = tiny.unet()
    code = tiny.random_code(read_space(model))
    small = slice_unet(model, code)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not ours & {p.untyped_storage().data_ptr() for p in small.parameters()}
    for parameter in small.parameters():  # no view keeps a whole weight alive
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


def test_a_slice_is_a_stock_model_that_trains_checkpoints_and_slices_again():
    model = tiny.unet().train()
    space = read_space(model)
    small = slice_unet(model, tiny.random_code(space))
    assert type(small) is UNet2DConditionModel
    assert small.training
    small.enable_gradient_checkpointing()
    small(**tiny.inputs(small)).sample.mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    again = read_space(small)
    assert 0 < len(again) < len(space)
    smaller = slice_unet(small, ArchitectureCode.smallest(again))
    assert smaller(**tiny.inputs(smaller)).sample.isfinite().all()
    assert copy.deepcopy(small).state_dict().keys() == small.state_dict().keys()


def test_a_stock_pipeline_generates_with_a_slice():
    pipeline = build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    small = slice_unet(pipeline.unet, tiny.random_code(read_space(pipeline.unet)))
    pruned = type(pipeline)(**pipeline.components | {"unet": small}, requires_safety_checker=False)
    pruned.set_progress_bar_config(disable=True)
    (whole,), (cut,) = (
        p("a b", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        for p in (pipeline, pruned)
    )
    assert cut.shape == whole.shape
    assert cut.isfinite().all()
    assert not torch.equal(cut, whole)


@torch.no_grad()
def test_slicing_inside_the_gated_block_takes_no_hooks_along():
    model = tiny.unet()
    model.enable_gradient_checkpointing()
    space, inputs = read_space(model), tiny.inputs(model)
    code = tiny.random_code(space)
    outside = slice_unet(model, code)
    with gated(model, space) as gates, block_features(model):
        gates.set(torch.rand(1, len(space)))
        inside = slice_unet(model, code)
    torch.testing.assert_close(inside(**inputs).sample, outside(**inputs).sample, atol=0, rtol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in inside.modules())
    checkpointing = {module.__dict__.get("_gradient_checkpointing_func") for module in inside.modules()}
    assert checkpointing <= {module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()}


def test_a_code_of_another_model_is_refused():
    with pytest.raises(ValueError, match="read from another model"):
        slice_unet(tiny.unet(), ArchitectureCode.full(read_space(tiny.unet(block_out_channels=(64, 64)))))
