"""Laws of spaces and codes: legal by construction, and the same after JSON."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from aptp.codes import ArchitectureCode, PruningSpace, Site

WIDTH = (Site("a.conv2", "groups", 4, 8), Site("b.attn1.to_out.0", "heads", 2, 16), Site("b.ff.net.2", "hidden", 3, 10))
SPACE = PruningSpace(WIDTH, (Site("a", "resnet", 1, 32), Site("b", "transformer", 1, 32)), keep_order=(1, 0))


def test_width_entries_come_first_and_slices_tile_the_vector():
    covered = [i for site in SPACE.sites for i in range(*SPACE.slice_of(site.name).indices(len(SPACE)))]
    assert covered == list(range(len(SPACE))) == list(range(11))
    assert SPACE.slice_of("b.ff.net.2") == slice(6, 9)
    assert SPACE.slice_of("b") == slice(10, 11)


def test_a_width_site_is_owned_by_the_depth_site_around_it():
    assert SPACE.owners == (0, 1, 1)


def test_a_space_survives_json_with_its_fingerprint():
    again = PruningSpace.from_json(json.loads(json.dumps(SPACE.to_json())))
    assert again == SPACE
    assert again.fingerprint == SPACE.fingerprint
    assert PruningSpace(WIDTH, SPACE.depth, keep_order=(0, 1)).fingerprint != SPACE.fingerprint


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (((WIDTH[0], WIDTH[0]), ()), "'a.conv2' appears twice"),
        (((Site("a", "resnet", 1, 1),), ()), "'a' of kind 'resnet' is no width site"),
        (((), (Site("a", "resnet", 2, 1),)), "no depth site of one unit"),
        (((), SPACE.depth, (0, 0)), "exactly once"),
    ],
)
def test_an_illegal_space_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        PruningSpace(*arguments)


def test_an_unknown_site_is_named():
    with pytest.raises(ValueError, match=r"'nowhere' is not in this space"):
        SPACE.slice_of("nowhere")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=11, max_size=11))
def test_codes_survive_json_or_name_the_emptied_site(bits):
    vector = torch.tensor(bits)
    emptied = [site.name for site in WIDTH if not vector[SPACE.slice_of(site.name)].any()]
    if emptied:
        with pytest.raises(ValueError, match=emptied[0]):
            ArchitectureCode(SPACE, vector)
        return
    code = ArchitectureCode(SPACE, vector)
    again = ArchitectureCode.from_json(SPACE, json.loads(json.dumps(code.to_json())))
    assert again == code
    assert hash(again) == hash(code)


def test_a_code_does_not_change_with_the_tensor_it_was_made_of():
    bits = torch.ones(11, dtype=torch.bool)
    code = ArchitectureCode(SPACE, bits)
    bits.zero_()
    assert code == ArchitectureCode.full(SPACE)


def test_kept_units_and_dropped_layers_are_read_by_name():
    bits = torch.ones(11, dtype=torch.bool)
    bits[[0, 2, 10]] = False
    code = ArchitectureCode(SPACE, bits)
    assert code.kept_units("a.conv2").tolist() == [1, 3]
    assert code.drops("b")
    assert not code.drops("a")
    smallest = ArchitectureCode.smallest(SPACE)
    assert smallest.mask.sum() == len(WIDTH) + 1
    assert (smallest.drops("a"), smallest.drops("b")) == (True, False)  # b is kept longest
    assert ArchitectureCode.smallest(PruningSpace(WIDTH, SPACE.depth)).mask.sum() == len(WIDTH)


def test_a_code_of_another_space_is_refused():
    other = PruningSpace(WIDTH, SPACE.depth)
    with pytest.raises(ValueError, match="belongs to the space"):
        ArchitectureCode.from_json(other, ArchitectureCode.full(SPACE).to_json())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep": {"a.conv2": [0, 4], "b.attn1.to_out.0": [0], "b.ff.net.2": [0]}}, "units 0 to 3"),
        ({"keep": {"a.conv2": [0]}}, "every width site"),
        ({"drop": ["a.conv2"]}, "only depth sites"),
        ({"surplus": 1}, "found drop, keep, space, surplus"),
    ],
)
def test_a_broken_code_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        ArchitectureCode.from_json(SPACE, ArchitectureCode.full(SPACE).to_json() | change)
