"""Laws of the gates: open is the stock model bit for bit, leaving leaves no trace, each sample obeys its own mask."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import set_checkpoint_early_stop

from aptp.codes import ArchitectureCode
from aptp.gates import block_features, gated
from aptp.sites import read_space
from tests.support import tiny
from tests.support.one_device import OnMeta


@pytest.fixture(params=tiny.MODELS)
def model(request):
    return tiny.MODELS[request.param]()


def run(model, **inputs):
    return model(**inputs).sample


def random_mask(space, batch, seed=0):
    return torch.rand(batch, len(space), generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05


@torch.no_grad()
def test_open_gates_are_the_stock_model_bit_for_bit(model):
    space, inputs = read_space(model), tiny.inputs(model)
    stock = run(model, **inputs)
    with gated(model, space) as gates:
        assert torch.equal(run(model, **inputs), stock)
        gates.set(torch.ones(2, len(space)))
        assert torch.equal(run(model, **inputs), stock)
        gates.set(random_mask(space, 2))
        assert not torch.allclose(run(model, **inputs), stock, atol=1e-3)
        gates.open()
        assert torch.equal(run(model, **inputs), stock)


def traces(model):
    hooks = [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in (
            "_forward_pre_hooks",
            "_forward_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_with_kwargs",
        )
    ]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    functions = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
    return hooks, attributes, functions, [(k, v.data_ptr()) for k, v in model.state_dict().items()]


def test_leaving_leaves_no_trace_even_after_an_error(model):
    model.enable_gradient_checkpointing()
    space, before = read_space(model), traces(model)
    with gated(model, space) as gates, block_features(model):
        gates.set(torch.ones(1, len(space)))
        assert traces(model)[1] == before[1]  # the state dict never changes
    assert traces(model) == before
    with pytest.raises(RuntimeError, match="inside"), gated(model, space), block_features(model):
        raise RuntimeError("inside")
    assert traces(model) == before


@torch.no_grad()
def test_every_sample_obeys_its_own_mask(model):
    space, inputs = read_space(model), tiny.inputs(model, batch=3)
    masks = random_mask(space, 3)
    with gated(model, space) as gates:
        gates.set(masks)
        together = run(model, **inputs)
        for i in range(3):
            gates.set(masks[i : i + 1])
            everyone = run(model, **inputs)  # one row serves the whole batch
            torch.testing.assert_close(together[i], everyone[i], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_masks_are_tiled_over_classifier_free_guidance(model):
    space, inputs = read_space(model), tiny.inputs(model, batch=4)
    masks = random_mask(space, 2)
    with gated(model, space) as gates:
        gates.set(masks)
        tiled = run(model, **inputs)
        gates.set(torch.cat([masks, masks]))
        assert torch.equal(run(model, **inputs), tiled)
        gates.set(random_mask(space, 3))
        with pytest.raises(ValueError, match="a batch of 4 under 3 masks"):
            run(model, **inputs)


def test_wrong_masks_and_foreign_spaces_are_refused():
    unet, space = tiny.unet(), read_space(tiny.unet())
    with gated(unet, space) as gates, pytest.raises(ValueError, match=f"takes \\(batch, {len(space)}\\)"):
        gates.set(torch.ones(2, 7))
    with pytest.raises(ValueError, match="read from another model"), gated(tiny.pixart(), space):
        pass
    unet.compile()
    with pytest.raises(ValueError, match="compile it inside the gated block"), gated(unet, space):
        pass


@torch.no_grad()
def test_a_dropped_layer_passes_the_stream_and_not_the_skip():
    """The oracle is the network with that layer's forward replaced by hand."""
    space = read_space(tiny.unet(), depth="every")
    for site in space.depth:
        unet, mask = tiny.unet(), torch.ones(1, len(space))
        inputs = tiny.inputs(unet)
        mask[:, space.slice_of(site.name)] = 0
        with gated(unet, space) as gates:
            gates.set(mask)
            dropped = run(unet, **inputs)
        layer = unet.get_submodule(site.name)
        if site.kind == "resnet":
            width = layer.conv2.out_channels
            layer.forward = lambda hidden, temb, width=width: hidden.split([width, hidden.shape[1] - width], 1)[0]
        else:
            layer.forward = lambda hidden, **_: (hidden,)
        torch.testing.assert_close(run(unet, **inputs), dropped, atol=1e-6, rtol=1e-5)


def task_gradient(model, space, mask, inputs):
    mask = mask.clone().requires_grad_()
    with gated(model, space) as gates:
        gates.set(mask)
        run(model, **inputs).square().mean().backward()
    return mask.grad


def test_the_task_reaches_every_gate(model):
    """A soft mask before a GroupNorm would be normalised away (its gradient is some 1e4 times smaller)."""
    model.requires_grad_(False)
    space, inputs = read_space(model), tiny.inputs(model)
    gradient = task_gradient(model, space, torch.full((2, len(space)), 0.8), inputs)
    assert gradient is not None
    assert (gradient != 0).all()
    size = {
        kind: torch.cat([gradient[:, space.slice_of(s.name)].flatten() for s in space.sites if s.kind == kind])
        .abs()
        .median()
        for kind in {site.kind for site in space.width}
    }
    assert max(size.values()) < 1000 * min(size.values())


def test_a_closed_depth_gate_still_learns_what_opening_it_would_change():
    """At exactly zero, as straight-through gates are: the gradient is that of the line from bypassing to keeping."""
    unet = tiny.unet().double().requires_grad_(False)
    space = read_space(unet)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs(unet, batch=1).items()}
    site = space.depth[-1]
    mask = torch.ones(1, len(space), dtype=torch.float64)
    mask[:, space.slice_of(site.name)] = 0
    gradient = task_gradient(unet, space, mask, inputs)[:, space.slice_of(site.name)]
    with torch.no_grad(), gated(unet, space) as gates:
        losses = []
        for gate in (0.0, 1e-6):
            mask[:, space.slice_of(site.name)] = gate
            gates.set(mask)
            losses.append(run(unet, **inputs).square().mean())
    assert float(gradient) == pytest.approx(float(losses[1] - losses[0]) / 1e-6, rel=1e-4)
    assert float(gradient) != 0


def test_the_gradient_of_a_gate_is_that_of_finite_differences(model):
    space, inputs = read_space(model), tiny.inputs(model, batch=1)
    model.double().requires_grad_(False)
    inputs = {
        k: v if not isinstance(v, torch.Tensor) or not v.is_floating_point() else v.double() for k, v in inputs.items()
    }
    if "added_cond_kwargs" in inputs:
        inputs["added_cond_kwargs"] = {k: v.double() for k, v in inputs["added_cond_kwargs"].items()}
    mask = random_mask(space, 1).double()
    gradient = task_gradient(model, space, mask, inputs)
    entries = [space.slice_of(site.name).start for site in (*space.width[:4], *space.depth[:2], space.width[-1])]
    with torch.no_grad(), gated(model, space) as gates:
        for entry in entries:
            step = torch.zeros_like(mask)
            step[0, entry] = 1e-4
            values = []
            for moved in (mask + step, mask - step):
                gates.set(moved)
                values.append(run(model, **inputs).square().mean())
            assert (values[0] - values[1]) / 2e-4 == pytest.approx(float(gradient[0, entry]), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["unet", "pixart"])
@pytest.mark.parametrize("after_leaving", [False, True])
def test_gradient_checkpointing_recomputes_under_the_same_gates(name, after_leaving):
    model = tiny.MODELS[name]().train()
    space, inputs = read_space(model), tiny.inputs(model)
    mask = random_mask(space, 2)

    def gradients(checkpointing):
        subject, leaf = copy.deepcopy(model), mask.clone().requires_grad_()
        if checkpointing:
            subject.enable_gradient_checkpointing()
        with gated(subject, space) as gates:
            gates.set(leaf)
            loss = run(subject, **inputs).square().mean()
            gates.set(torch.zeros_like(mask))  # the next mask comes before this one's backward pass
            if not after_leaving:
                loss.backward()
        if after_leaving:
            loss.backward()
        return leaf.grad, [p.grad for p in subject.parameters()]

    plain, checkpointed = gradients(False), gradients(True)
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


def test_entering_again_and_all_passes_leave_the_device_for_nothing(model):
    model.requires_grad_(False)
    space, inputs = read_space(model), tiny.inputs(model)
    mask = random_mask(space, 2).to("meta").requires_grad_()
    model.to("meta")
    inputs = {name: tree_map(lambda value: value.to("meta"), value) for name, value in inputs.items()}
    with gated(model, space) as gates:
        gates.set(mask)  # an index is copied once
    with OnMeta(), gated(model, space) as gates, block_features(model) as features:
        with torch.no_grad():
            teacher = run(model, **inputs)
        gates.set(mask)
        student = run(model, **inputs)
        (student - teacher).square().mean().backward()
        assert features
    assert mask.grad is not None


def test_gates_first_set_without_gradients_have_them_later(model):
    space, inputs = read_space(model), tiny.inputs(model)
    with torch.inference_mode(), gated(model, space) as gates:
        gates.set(random_mask(space, 2))
    assert task_gradient(model, space, random_mask(space, 2), inputs).isfinite().all()


def test_autocast_keeps_the_type_of_the_model(model):
    model.requires_grad_(False)
    space, inputs = read_space(model), tiny.inputs(model)
    mask = random_mask(space, 2)
    with gated(model, space) as gates:
        gates.set(mask)
        exact = run(model, **inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = run(model, **inputs)
            gates.open()
            plain_type = run(model, **inputs).dtype
    assert rough.dtype == plain_type
    assert (rough.float() - exact).norm() < 0.1 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        gradient = task_gradient(model, space, mask, inputs)
    assert gradient.isfinite().all()
    assert gradient.dtype == torch.float32


COMPILED = """
import torch
from aptp.gates import block_features, gated
from aptp.sites import read_space
from tests.support import tiny

unet = tiny.unet(layers_per_block=1, block_out_channels=(32,), attention_head_dim=(2,), mid_block_type=None,
                 down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
space, inputs = read_space(unet), tiny.inputs(unet)
with torch.no_grad(), gated(unet, space) as gates, block_features(unet) as features:
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    for mask in (torch.rand(2, len(space)), torch.rand(2, len(space)), None):
        gates.open() if mask is None else gates.set(mask)
        assert torch.equal(compiled(**inputs).sample, unet(**inputs).sample)
        assert len(features) == 2
"""


def test_compiled_inside_the_block_the_gates_still_gate_in_one_graph():
    # In its own process: the shape checks of this test run are not part of the library, and dynamo cannot trace them.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parents[2])


@torch.no_grad()
def test_block_features_are_the_hidden_outputs_of_the_stages():
    unet = tiny.unet()
    inputs = tiny.inputs(unet)
    seen = []
    with block_features(unet) as features:
        output = run(unet, **inputs)
        seen = list(features)
        run(unet, **tiny.inputs(unet, seed=2))
        assert len(features) == 5  # of the latest pass only
        assert not torch.equal(features[0], seen[0])
    assert [tuple(f.shape[1:]) for f in seen] == [(32, 4, 4), (64, 4, 4), (64, 4, 4), (64, 8, 8), (32, 8, 8)]
    # The last feature is the input of the output head.
    head = unet.conv_out(unet.conv_act(unet.conv_norm_out(seen[-1])))
    torch.testing.assert_close(head, output)


def test_features_are_not_collected_twice_when_recomputed():
    model = tiny.pixart().train()
    model.enable_gradient_checkpointing()
    with block_features(model) as features, set_checkpoint_early_stop(False):
        loss = run(model, **tiny.inputs(model)).mean() + sum(f.mean() for f in features)
        loss.backward()
        assert len(features) == 4


@torch.no_grad()
def test_full_and_smallest_codes_are_legal_masks(model):
    space, inputs = read_space(model), tiny.inputs(model)
    with gated(model, space) as gates:
        gates.set(ArchitectureCode.full(space).mask[None])
        full = run(model, **inputs)
        gates.set(ArchitectureCode.smallest(space).mask[None])
        assert run(model, **inputs).isfinite().all()
    assert torch.equal(full, run(model, **inputs))
