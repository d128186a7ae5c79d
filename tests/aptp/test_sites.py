"""Spaces are read from the models themselves; the numbers are those of the published method and its released files."""

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel

from aptp.codes import PruningSpace
from aptp.sites import Granule, any_order, check_space, read_space
from tests.support import tiny


def units(space: PruningSpace, kind: str) -> list[int]:
    return [site.units for site in space.sites if site.kind == kind]


def test_sd21_has_the_published_space():
    unet = tiny.on_meta(**tiny.SD21)
    space = read_space(unet)
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    assert (len(space.width), space.width_entries, len(space.depth), len(space)) == (70, 1606, 14, 1620)
    assert units(space, "groups") == [32] * 22
    assert sorted(set(units(space, "heads"))) == [5, 10, 20]
    assert units(space, "hidden") == [32] * 16
    # Where every block begins in the published vector, and the order in which the official code drops layers.
    starts = {"down_blocks.1": 148, "down_blocks.2": 316, "down_blocks.3": 524, "mid_block": 588, "up_blocks.0": 724}
    starts |= {"up_blocks.1": 820, "up_blocks.2": 1132, "up_blocks.3": 1384}
    for block, start in starts.items():
        first = next(site for site in space.width if site.name.startswith(block))
        assert space.slice_of(first.name).start == start
    assert space.keep_order == (13, 12, 0, 1, 11, 10, 2, 3, 9, 8, 4, 5, 7, 6)
    assert [site.name for site in space.depth[6:9]] == [
        "down_blocks.3.resnets.1",
        "up_blocks.0.resnets.2",
        "up_blocks.1.resnets.2",
    ]


def test_channels_of_the_sites_are_those_of_the_layers():
    unet = tiny.on_meta(**tiny.SD21)
    space = read_space(unet)
    for site in space.width:
        assert unet.get_submodule(site.name).weight.shape[1] == site.channels
    assert {site.channels_per_unit for site in space.width if site.kind == "heads"} == {64}


@pytest.mark.parametrize(
    ("config", "width", "depth"),
    [
        (tiny.SD15, 70, 14),
        (tiny.EMOJI, 70, 14),
        # 17 resnets; 70 transformer layers of 3 sites; down 0/1/2 and up 0/1/2 with 1, 2, 2, 2, 2, 1 last layers.
        (tiny.SDXL, 17 + 70 * 3, 10),
    ],
)
def test_other_unets(config, width, depth):
    space = read_space(tiny.on_meta(**config))
    assert (len(space.width), len(space.depth)) == (width, depth)


def test_stacked_transformer_blocks_can_be_dropped_one_by_one():
    unet = tiny.on_meta(**tiny.SDXL)
    every = read_space(unet, depth="every")
    assert units(every, "block") == [1] * (2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2)  # down, middle, up
    assert units(every, "transformer") == []
    assert units(read_space(unet), "block") == []


def test_a_diffusion_transformer_offers_heads_hidden_units_and_whole_blocks():
    space = read_space(tiny.on_meta(PixArtTransformer2DModel))
    assert units(space, "heads") == [16] * 56
    assert units(space, "hidden") == [32] * 28
    assert units(space, "block") == [1] * 28
    assert space.keep_order is not None
    distance = [min(i, 27 - i) for i in space.keep_order]
    assert all(a <= b for a, b in pairwise(distance))


def test_odd_unets_are_read_too():
    one_block = tiny.unet(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        attention_head_dim=(2,),
    )
    space = read_space(one_block)
    assert {site.kind for site in space.width} == {"groups"}
    single_headed = read_space(tiny.unet(attention_head_dim=(1, 1)))
    assert units(single_headed, "heads") == []  # one head leaves no choice
    narrow = read_space(tiny.unet(layers_per_block=1))
    # A single layer whose width changes cannot be passed by: down block 1 offers none.
    assert [site.name for site in narrow.depth] == [
        "down_blocks.0.resnets.0",
        "down_blocks.0.attentions.0",
        "up_blocks.0.resnets.1",
        "up_blocks.1.resnets.1",
        "up_blocks.1.attentions.1",
    ]


def test_every_layer_of_equal_width_can_be_offered_or_none():
    unet = tiny.unet()
    every = {site.name for site in read_space(unet, depth="every").depth}
    assert {"mid_block.resnets.0", "down_blocks.0.resnets.0", "up_blocks.0.resnets.0", "up_blocks.1.resnets.1"} <= every
    # 32 channels enter the second down block, 64 leave its first resnet; in the last up block 64 enter and 32 leave.
    assert not every & {"down_blocks.1.resnets.0", "up_blocks.1.resnets.0"}
    assert read_space(unet, depth="none").depth == ()
    assert read_space(unet, depth_order=any_order).keep_order is None


def test_the_granule_sets_the_alignment():
    aligned = read_space(tiny.on_meta(**tiny.SD21), granule=Granule(groups=4, heads=5, hidden=64))
    assert units(aligned, "groups") == [8] * 22
    assert set(units(aligned, "heads")) == {2, 4}
    assert {site.channels_per_unit for site in aligned.width if site.kind == "hidden"} == {64}
    with pytest.raises(ValueError, match=r"down_blocks.0.attentions.0.*attn1.*granule.heads = 2 does not divide its 5"):
        read_space(tiny.on_meta(**tiny.SD21), granule=Granule(heads=2))
    with pytest.raises(ValueError, match=r"granule.groups = 0"):
        Granule(groups=0)


def test_a_space_is_checked_against_the_model():
    check_space(tiny.unet(), read_space(tiny.unet(seed=3)))
    with pytest.raises(ValueError, match=r"site 'down_blocks.0.resnets.0.conv2' has 32 .* and 64 in this model"):
        check_space(tiny.unet(block_out_channels=(64, 64)), read_space(tiny.unet()))
    shallow = read_space(tiny.unet(layers_per_block=1), depth="every")
    assert shallow.depth
    with pytest.raises(ValueError, match="another model"):
        check_space(tiny.pixart(), shallow)


def test_unsupported_models_say_what_to_do():
    with pytest.raises(ValueError, match="AutoencoderKL is not a supported backbone"):
        read_space(AutoencoderKL(block_out_channels=(32,), norm_num_groups=8))
    with pytest.raises(ValueError, match="OptimizedModule is not a supported backbone"):
        read_space(torch.compile(tiny.unet()))  # type: ignore[arg-type]
    fused = tiny.unet()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"attn1.to_qkv.*unfuse"):
        read_space(fused)
