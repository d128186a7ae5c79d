"""Intervals against their closed forms, and what is shared between seeds or arms."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from aptp_platform.experts.evidence.intervals import (
    Resamples,
    mean_interval,
    mean_ratio,
    rank_correlation,
    rank_interval,
)

ROWS = 400


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_one_seed_gives_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, (1, ROWS))
    found = mean_interval(values)
    reach = 1.96 * 2 / ROWS**0.5
    assert list(found) == pytest.approx([values.mean() - reach, values.mean() + reach], abs=0.04)


def test_more_seeds_do_not_make_the_choice_of_prompts_surer_nor_more_prompts_that_of_seeds() -> None:
    """What is the same in every seed has the interval of one seed; what a seed shifts does not shrink with prompts."""
    rng = np.random.default_rng(0)
    by_prompt = np.repeat(rng.normal(0, 1, (1, ROWS)), 5, axis=0)
    assert width(mean_interval(by_prompt)) == pytest.approx(width(mean_interval(by_prompt[:1])), rel=0.15)
    by_seed = np.repeat(np.array([[-1.0], [0.0], [1.0], [2.0]]), ROWS, axis=1)
    exact = 2 * 1.96 * by_seed[:, 0].std() / 2
    assert width(mean_interval(by_seed)) == pytest.approx(exact, rel=0.15)
    assert width(mean_interval(by_seed[:, :50])) == pytest.approx(exact, rel=0.15)


def test_arms_share_their_draws() -> None:
    shared = np.random.default_rng(0).normal(1, 1, (3, ROWS))
    resamples = Resamples.of(3, ROWS)
    assert np.allclose(resamples.means(shared + 0.5) - resamples.means(shared), 0.5)
    ratio, interval = mean_ratio(2 * shared, shared, resamples)
    assert ratio == pytest.approx(2)
    assert interval is not None
    assert list(interval) == pytest.approx([2, 2])


def test_a_ratio_to_what_may_be_zero_has_no_interval() -> None:
    resamples = Resamples.of(1, ROWS)
    unsure = np.random.default_rng(0).normal(0, 1, (1, ROWS))
    unsure += 0.01 - unsure.mean()
    ratio, interval = mean_ratio(np.ones((1, ROWS)), unsure, resamples)
    assert ratio == pytest.approx(100)
    assert interval is None
    assert mean_ratio(np.ones((1, ROWS)), -np.ones((1, ROWS)), resamples) == (None, None)


def test_rank_correlation_is_scipys_and_constant_sides_do_not_count() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (2, ROWS)).astype(float)
    y = x + rng.normal(0, 3, x.shape)
    each = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert rank_correlation(x, y) == pytest.approx(np.mean(each))
    interval = rank_interval(x, y)
    assert interval is not None
    assert interval[0] < np.mean(each) < interval[1]
    assert 0.05 < width(interval) < 0.3
    y[1] = 0.4
    assert rank_correlation(x, y) == pytest.approx(each[0])
    assert rank_correlation(x, np.full_like(x, 0.4)) is None
    assert rank_interval(x, np.full_like(x, 0.4)) is None


def test_one_row_has_an_interval_of_no_width() -> None:
    assert mean_interval(np.ones((1, 1))) == (1.0, 1.0)
