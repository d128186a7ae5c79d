# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import pytest
import torch
from scipy import stats

from aptp.noise import Noise, _between, philox, sample_noise

ROWS = torch.tensor([3, 2**63 - 1, 0, 2**40 + 5])


def a_noise(step: int = 0, rows: torch.Tensor = ROWS, seed: int = 0) -> Noise:
    return Noise(seed, step, rows)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, words):
    first, second, third, fourth = (torch.tensor([int(word, 16)]) for word in counter.split())
    left, right = (int(word, 16) for word in key.split())
    assert " ".join(f"{int(word):08x}" for word in philox((first, second, third, fourth), (left, right))) == words


DRAWS = {
    "uniform": lambda noise: noise.uniform(3, 5, use="a"),
    "normal": lambda noise: noise.normal(3, 5, use="a"),
    "gumbel": lambda noise: noise.gumbel(15, use="a"),
    "integers": lambda noise: noise.integers(1000, use="a"),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_row_has_its_numbers_wherever_it_stands_and_other_ones_for_all_else(draw):
    drawn = draw(a_noise())
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(draw(a_noise(rows=ROWS[order])), drawn[order])
    assert torch.equal(torch.cat([draw(a_noise(rows=ROWS[:1])), draw(a_noise().of(ROWS[1:]))]), drawn)
    assert torch.equal(draw(Noise(0, torch.tensor(0), ROWS)), drawn), "the step as a tensor"
    for other in (a_noise(step=1), a_noise(seed=1), a_noise(rows=ROWS ^ 1), a_noise(rows=ROWS ^ 2**33)):
        assert not torch.isin(draw(other), drawn).any()


def test_each_use_has_numbers_of_its_own():
    assert not torch.isin(a_noise().uniform(50, use="a"), a_noise().uniform(50, use="b")).any()


@pytest.mark.parametrize(
    ("drawn", "law"),
    [
        (a_noise().uniform(20_000, use="u"), stats.uniform),
        (a_noise().normal(20_001, use="n"), stats.norm),
        (a_noise().gumbel(20_000, use="g"), stats.gumbel_r),
        (a_noise(rows=torch.arange(50_000)).integers(1000, use="i")[None] / 1000 + 0.0005, stats.uniform),
        (a_noise(rows=torch.arange(50_000)).normal(1, use="rows").T, stats.norm),
    ],
    ids=["uniform", "normal", "gumbel", "integers", "normal of rows"],
)
def test_numbers_follow_their_law_and_neighbours_are_independent(drawn, law):
    for row in drawn:
        assert stats.kstest(row.numpy(), law.cdf).pvalue > 1e-3
        for lag in (1, 2, 3):
            assert abs(torch.corrcoef(torch.stack([row[lag:], row[:-lag]]))[0, 1]) < 4 / len(row) ** 0.5


def test_the_least_and_the_largest_word_have_finite_logarithms():
    ends = _between(torch.tensor([0, 2**32 - 1]))
    assert ends.tolist() == [2.0**-24, 1 - 2.0**-24]
    assert torch.isfinite(torch.log(-torch.log(ends))).all()


def test_nothing_may_be_drawn_and_images_of_one_channel_too():
    assert a_noise().normal(0, use="n").shape == (4, 0)
    noise, timesteps = sample_noise(torch.zeros(4, 1, 2, 3, dtype=torch.bfloat16), 1000, a_noise())
    assert (noise.shape, noise.dtype) == ((4, 1, 2, 3), torch.bfloat16)
    assert timesteps.tolist() == a_noise().integers(1000, use="timesteps").tolist()


def test_numbers_are_drawn_where_the_rows_are():
    assert a_noise(rows=ROWS.to("meta")).normal(5, use="n").device.type == "meta"
