"""How far codes agree with another grouping of the prompts: adjusted mutual information, beside that of k-means."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2
from scipy.special import gammaln

STARTS: Final = 5  # of k-means; the tightest clustering counts


def adjusted_mutual_information(one: Sequence[object] | np.ndarray, other: Sequence[object] | np.ndarray) -> float:
    """1 for the same grouping, 0 on average for groupings that have nothing to do with each other.

    (I - E[I]) / (mean of both entropies - E[I]), where E[I] is over random groupings with the same sizes of groups
    (Vinh, Epps and Bailey 2010). Without the adjustment many small groups agree with anything.
    """
    if len(one) != len(other):
        raise ValueError(f"both groupings must be of the same rows: {len(one)} and {len(other)}")
    table = _contingency(one, other)
    rows, columns = table.sum(1), table.sum(0)
    if len(rows) == len(columns) == 1:
        return 1.0
    total = table.sum()
    expected = _expected_information(rows, columns)
    joint, product = table / total, np.outer(rows, columns) / total**2
    seen = table > 0
    information = float((joint[seen] * np.log(joint[seen] / product[seen])).sum())
    largest = (_entropy(rows) + _entropy(columns)) / 2
    # Where nothing but one group can be expected both differences vanish: no agreement beyond chance.
    return 0.0 if largest - expected < 1e-12 else (information - expected) / (largest - expected)


def nearest_centres(embeddings: Float[np.ndarray, "row dim"], count: int) -> Int[np.ndarray, " row"]:
    """k-means of the prompts' embeddings: the grouping that similarity alone would give."""
    points = embeddings.astype(np.float64)
    tries = [kmeans2(points, count, minit="++", rng=start) for start in range(STARTS)]
    return min(tries, key=lambda found: float(((points - found[0][found[1]]) ** 2).sum()))[1]


def first_words(captions: Sequence[str]) -> list[str]:
    """The captions' templates, as far as their first word tells them apart."""
    return [caption.split(maxsplit=1)[0].lower() if caption.strip() else "" for caption in captions]


def _contingency(one: Sequence[object] | np.ndarray, other: Sequence[object] | np.ndarray) -> Int[np.ndarray, "a b"]:
    _, first = np.unique(np.asarray(one), return_inverse=True)
    _, second = np.unique(np.asarray(other), return_inverse=True)
    table = np.zeros((first.max() + 1, second.max() + 1), dtype=np.int64)
    np.add.at(table, (first, second), 1)
    return table


def _entropy(counts: Int[np.ndarray, " group"]) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _expected_information(rows: Int[np.ndarray, " a"], columns: Int[np.ndarray, " b"]) -> float:
    """The mean over all tables with these margins: each cell is hypergeometric."""
    total = int(rows.sum())
    expected = 0.0
    for a in rows:
        for b in columns:
            n = np.arange(max(1, a + b - total), min(a, b) + 1)
            log_chance = (
                gammaln(a + 1) + gammaln(b + 1) + gammaln(total - a + 1) + gammaln(total - b + 1)
                - gammaln(total + 1) - gammaln(n + 1) - gammaln(a - n + 1) - gammaln(b - n + 1)
                - gammaln(total - a - b + n + 1)
            )  # fmt: skip
            expected += float((n / total * np.log(total * n / (a * b)) * np.exp(log_chance)).sum())
    return expected
