"""Experts survive the disk, are refused when anything is amiss, and never load as noise."""

import json
import shutil

import pytest
import torch
from diffusers import AutoModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from aptp.cost import cost_table
from aptp.expert import BaseModel, load_expert, read_expert_info, save_expert
from aptp.sites import read_space
from aptp.slicing import slice_unet
from tests.support import tiny


def written(folder, name="unet", seed=0):
    model = tiny.MODELS[name]()
    code = tiny.random_code(read_space(model), seed=seed)
    small, base = slice_unet(model, code), BaseModel.of(model, f"tiny {name}")
    table = cost_table(model, code.space, (8, 8), 5)
    save_expert(folder, small, code, base=base, cost=table)
    return model, small, code, base, table


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.MODELS)
def test_an_expert_comes_back_whole(tmp_path, name):
    _, small, code, base, table = written(tmp_path / "expert", name)
    shutil.move(tmp_path / "expert", tmp_path / "elsewhere")
    again = load_expert(tmp_path / "elsewhere", base=base)
    assert type(again) is type(small)
    assert not again.training
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in small.state_dict().items()}
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in again.state_dict().items())
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    inputs = tiny.inputs(small)
    torch.testing.assert_close(again(**inputs).sample, small(**inputs).sample, atol=1e-6, rtol=1e-6)
    info = read_expert_info(tmp_path / "elsewhere")
    assert (info.code, info.base) == (code, base)
    assert info.cost.macs == float(table.macs(code.mask[None]))
    assert info.cost.params == sum(p.numel() for p in small.parameters())
    assert (info.cost.latent_size, info.cost.num_text_tokens, info.cost.convention) == ((8, 8), 5, "true")


def test_half_precision_and_fine_tuned_weights_are_kept(tmp_path):
    _, small, code, base, table = written(tmp_path)
    small.to(torch.bfloat16)
    with torch.no_grad():
        small.conv_in.weight.add_(1)
    save_expert(tmp_path, small, code, base=base, cost=table)
    again = load_expert(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.conv_in.weight, small.conv_in.weight)


def test_a_loaded_expert_trains_without_touching_its_file(tmp_path):
    written(tmp_path)
    before = (tmp_path / "expert.safetensors").read_bytes()
    again = load_expert(tmp_path).train()
    again(**tiny.inputs(again)).sample.mean().backward()
    torch.optim.SGD(again.parameters(), lr=1).step()
    assert (tmp_path / "expert.safetensors").read_bytes() == before


@pytest.mark.parametrize("load", [UNet2DConditionModel.from_pretrained, AutoModel.from_pretrained])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}])
def test_a_stock_loader_fails_and_names_ours(tmp_path, load, options):
    written(tmp_path)
    with pytest.raises(ValueError, match=r"cut from tiny unet; load it with aptp\.load_expert"):
        load(tmp_path, **options)


def test_another_base_is_refused_by_name_and_by_weights(tmp_path):
    model, _, _, base, _ = written(tmp_path)
    assert BaseModel.of(model, "tiny unet") == base
    with pytest.raises(ValueError, match=r"cut from 'tiny unet' .* not from 'other'"):
        load_expert(tmp_path, base=BaseModel("other", base.sha256))
    other = BaseModel.of(tiny.unet(seed=1), "tiny unet")
    with pytest.raises(ValueError, match=f"not from 'tiny unet' \\({other.sha256[:12]}\\)"):
        load_expert(tmp_path, base=other)


def test_a_slice_is_saved_only_with_its_own_code(tmp_path):
    model, small, code, base, table = written(tmp_path)
    other = tiny.random_code(code.space, seed=5)
    with pytest.raises(ValueError, match="together with the code it was cut by"):
        save_expert(tmp_path / "new", small, other, base=base, cost=table)
    small_table = cost_table(model, read_space(model, depth="none"), (8, 8))
    with pytest.raises(ValueError, match="cost table is of another space"):
        save_expert(tmp_path / "new", small, code, base=base, cost=small_table)
    assert not (tmp_path / "new").exists()


def test_broken_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"is not an expert: it has no code\.json"):
        load_expert(tmp_path)
    written(tmp_path)
    weights, info = tmp_path / "expert.safetensors", tmp_path / "code.json"
    whole, tensors = json.loads(info.read_text()), load_file(weights)

    save_file({k: v for k, v in tensors.items() if k != "conv_in.bias"}, weights)
    with pytest.raises(ValueError, match=r"'conv_in.bias' has shape none"):
        load_expert(tmp_path)
    save_file(tensors | {"surplus": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match=r"'surplus' .* asks for none"):
        load_expert(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"it has no expert\.safetensors"):
        load_expert(tmp_path)

    for change, named in (
        ({"format": 2}, "format 1"),
        ({"backbone": "os.system"}, "'os.system' is not in"),
        ({"base": {"name": "x"}}, "sha256"),
        ({"code": whole["code"] | {"space": "0" * 64}}, "belongs to the space"),
    ):
        info.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=named):
            read_expert_info(tmp_path)


def test_nothing_in_the_folder_is_a_pickle(tmp_path):
    written(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["code.json", "config.json", "expert.safetensors"]
    for file in tmp_path.iterdir():
        head = file.read_bytes()[:2]
        assert head != b"PK"
        assert head[:1] != b"\x80" or file.suffix == ".safetensors"
