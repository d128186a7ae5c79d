"""Intervals by bootstrap over seeds and prompts, for means, ratios of means and rank correlations.

All runs are scored on the same held-out prompts, so a draw takes seeds with replacement and, independently of them,
prompts with replacement: the same prompts in every seed and for every arm. What two arms share then cancels out in
their difference. With one seed an interval covers the choice of prompts alone; with n seeds it is too narrow by a
factor of sqrt((n - 1) / n) where the seeds dominate.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

DRAWS: Final = 2000
RANK_DRAWS: Final = 500  # each sorts all prompts again
LEAST_FOR_RANKS: Final = 3

Interval = tuple[float, float]


@dataclass(frozen=True)
class Resamples:
    """How often each seed and each prompt was drawn, as weights that sum to one in every draw."""

    seeds: Float[np.ndarray, "draw seed"]
    prompts: Float[np.ndarray, "draw row"]

    @classmethod
    def of(cls, seeds: int, rows: int) -> "Resamples":
        rng = np.random.default_rng(0)
        return cls(
            rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds,
            rng.multinomial(rows, np.full(rows, 1 / rows), size=DRAWS) / rows,
        )

    def means(self, values: Float[np.ndarray, "seed row"]) -> Float[np.ndarray, " draw"]:
        """The mean of each draw."""
        return ((self.prompts @ values.T) * self.seeds).sum(1)


def interval_of(draws: Float[np.ndarray, " draw"]) -> Interval:
    """The middle 95 % of what the draws gave."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def mean_interval(values: Float[np.ndarray, "seed row"], resamples: Resamples | None = None) -> Interval:
    """A 95 % interval of the mean."""
    return interval_of((resamples or Resamples.of(*values.shape)).means(values))


def mean_ratio(
    above: Float[np.ndarray, "seed row"], below: Float[np.ndarray, "seed row"], resamples: Resamples
) -> tuple[float | None, Interval | None]:
    """The ratio of two means with its interval; None where what stands below is not sure to be positive."""
    if below.mean() <= 0:
        return None, None
    ratio = float(above.mean() / below.mean())
    draws = resamples.means(below)
    return ratio, interval_of(resamples.means(above) / draws) if draws.min() > 0 else None


def rank_correlation(x: Float[np.ndarray, "seed row"], y: Float[np.ndarray, "seed row"]) -> float | None:
    """Spearman's rank correlation over prompts, a mean over the seeds where neither side is constant; else None."""
    found = _correlations(x, y)
    return None if np.isnan(found).all() else float(np.nanmean(found))


def rank_interval(x: Float[np.ndarray, "seed row"], y: Float[np.ndarray, "seed row"]) -> Interval | None:
    """A 95 % interval of `rank_correlation`; None where that is None."""
    if rank_correlation(x, y) is None:
        return None
    rng, (seeds, rows) = np.random.default_rng(0), x.shape
    drawn = rng.integers(rows, size=(RANK_DRAWS, rows))
    by_seed = np.stack([_correlations(x[seed][drawn], y[seed][drawn]) for seed in range(seeds)], axis=1)
    chosen = np.take_along_axis(by_seed, rng.integers(seeds, size=(RANK_DRAWS, seeds)), axis=1)
    kept = chosen[~np.isnan(chosen).all(1)]
    return interval_of(np.nanmean(kept, axis=1)) if len(kept) else None


def _correlations(x: Float[np.ndarray, "sample row"], y: Float[np.ndarray, "sample row"]) -> np.ndarray:
    """Of each sample: the correlation of the ranks, ties sharing theirs; NaN where one side is constant."""
    if x.shape[1] < LEAST_FOR_RANKS:
        return np.full(len(x), np.nan)
    centred: list[Int[np.ndarray, "sample row"]] = []
    for values in (x, y):
        ranks = rankdata(values, axis=1)
        centred.append(ranks - ranks.mean(1, keepdims=True))
    norms = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    with np.errstate(invalid="ignore"):
        return np.where(norms > 0, (centred[0] * centred[1]).sum(1) / norms, np.nan)
