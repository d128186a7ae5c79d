"""Adjusted mutual information at values that others published, and at its limits."""

import numpy as np
import pytest

from aptp_platform.experts.evidence.agreement import adjusted_mutual_information, first_words, nearest_centres

# The example in scikit-learn's tests (test_adjusted_mutual_info_score): I = 0.41022, E[I] = 0.15042, adjusted 0.27821.
ONE = [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
OTHER = [1, 1, 1, 1, 2, 1, 2, 2, 2, 2, 3, 1, 3, 3, 3, 2, 2]


def test_the_published_example() -> None:
    assert adjusted_mutual_information(ONE, OTHER) == pytest.approx(0.27821, abs=1e-5)
    assert adjusted_mutual_information(OTHER, ONE) == pytest.approx(0.27821, abs=1e-5)


def test_the_limits() -> None:
    assert adjusted_mutual_information(ONE, [f"group {name}" for name in ONE]) == pytest.approx(1)
    assert adjusted_mutual_information([0] * 4, [0, 1, 2, 3]) == 0
    rng = np.random.default_rng(0)
    chance = [adjusted_mutual_information(rng.integers(0, 4, 200), rng.integers(0, 40, 200)) for _ in range(20)]
    assert abs(np.mean(chance)) < 0.01, "many small groups agree by chance; that is taken off"
    with pytest.raises(ValueError, match="3 and 2"):
        adjusted_mutual_information([0, 1, 2], [0, 1])


def test_k_means_finds_groups_that_are_there() -> None:
    truth = np.arange(90) % 3
    points = 10 * np.eye(3)[truth] + np.random.default_rng(0).normal(0, 1, (90, 3))
    assert adjusted_mutual_information(nearest_centres(points, 3), truth) == pytest.approx(1)


def test_first_words() -> None:
    assert first_words(["Noto emoji", "noto", ""]) == ["noto", "noto", ""]
