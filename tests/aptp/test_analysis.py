# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import pytest
import torch

from aptp.analysis import (
    budget_by_group,
    draw_kept_blocks,
    hardest_prompts,
    kept_by_block,
    words_by_code,
)
from aptp.codes import ArchitectureCode
from aptp.sites import read_space
from tests.support import tiny

SPACE = read_space(tiny.unet())


def test_words_are_typical_not_rare():
    flags = [f"flag of country{i} waving" for i in range(30)]
    faces = [f"smiling face number {i}" for i in range(30)]
    mixed = ["once flag"]
    indices = torch.tensor([0] * 30 + [1] * 31)
    first, second = words_by_code(flags + faces + mixed, indices, 2, top=3)
    assert {word for word, _ in first} == {"flag", "of", "waving"}
    assert {word for word, _ in second} == {"smiling", "face", "number"}
    assert first[0][1] > 3
    assert words_by_code(flags, torch.zeros(30, dtype=torch.long), 2)[1] == []


def test_groups_are_given_what_their_codes_cost():
    indices, ratios = torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 0.9])
    table = budget_by_group(["flag", "face", "face", "face"], indices, ratios)
    assert list(table) == ["face", "flag"]
    assert table["flag"].ratio == pytest.approx(0.5)
    assert table["face"].ratio == pytest.approx((0.5 + 2 * 0.9) / 3)
    assert table["face"].usage == pytest.approx((1 / 3, 2 / 3))


def test_the_hardest_prompt_is_the_one_that_lost_most_not_the_one_of_largest_loss():
    hardest = hardest_prompts(["a", "b", "c"], torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.9, 0.1, 0.1]), count=2)
    assert [prompt for prompt, _ in hardest] == ["b", "c"]
    assert hardest[0][1] == pytest.approx(0.4)


def test_blocks_are_counted_by_the_channels_that_are_left():
    full = kept_by_block(ArchitectureCode.full(SPACE))
    assert list(full) == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert set(full.values()) == {1.0}
    depth = next(i for i, site in enumerate(SPACE.depth) if site.name.startswith("up_blocks.1.att"))
    bits = ArchitectureCode.full(SPACE).bits
    bits[SPACE.width_entries + depth] = False
    inside = sum(site.channels for site, owner in zip(SPACE.width, SPACE.owners, strict=True) if owner == depth)
    block = sum(site.channels for site in SPACE.width if site.name.startswith("up_blocks.1."))
    kept = kept_by_block(ArchitectureCode(SPACE, bits))
    assert kept["up_blocks.1"] == pytest.approx(1 - inside / block)
    assert kept["down_blocks.0"] == 1


def test_the_figure_writes_every_share():
    figure = draw_kept_blocks([ArchitectureCode.full(SPACE), ArchitectureCode.smallest(SPACE)], [1.0, 0.2])
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert len(cells) == 10
    assert cells[:5] == ["100%"] * 5
    assert "code 1 (0.20 of MACs)" in [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one code a prompt"):
        words_by_code(["a"], torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="one group a prompt"):
        budget_by_group(["a"], torch.tensor([0, 1]), torch.ones(2))
    with pytest.raises(ValueError, match="at least one code"):
        draw_kept_blocks([], [])
