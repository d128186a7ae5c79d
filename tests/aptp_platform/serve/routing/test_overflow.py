"""Overflow as a transport problem: checked against scipy's exact assignment and against its own rules."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from aptp_platform.serve.routing.overflow import place

EQUAL = (0.5, 0.5, 0.5)


def test_with_room_everybody_goes_home() -> None:
    assert place([(0.1, 0.9, 0.2), (0.8, 0.1, 0.1)], EQUAL, (1, 1, 0)) == [1, 0]
    assert place([(0.1, 0.9, 0.2)] * 5, EQUAL, (0, float("inf"), 0)) == [1] * 5


def test_who_gives_way_is_who_loses_least() -> None:
    assert place([(0.9, 0.8, 0.1), (0.9, 0.2, 0.1)], EQUAL, (1, 1, 1)) == [1, 0]


def test_nobody_goes_to_a_smaller_code() -> None:
    assert place([(0.9, 0.8, 0.1)], (0.7, 0.5, 0.8), (0, 5, 5)) == [2]


def test_who_finds_no_room_waits_at_home() -> None:
    assert place([(0.9, 0.8, 0.1)], (0.7, 0.5, 0.6), (0, 5, 5)) == [0]
    assert place([(0.9, 0.8, 0.1)] * 2, EQUAL, (0, 0, 0)) == [0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_exact_assignment(seed: int) -> None:
    """As many single places as prompts, each place a code's: scipy's Hungarian method is the judge."""
    rng = np.random.default_rng(seed)
    similarities = rng.random((12, 4))
    rooms = np.array([5, 4, 2, 1])
    ours = place(similarities.tolist(), (0.5,) * 4, rooms.tolist())
    assert (np.bincount(ours, minlength=4) <= rooms).all()
    seats = np.repeat(np.arange(4), rooms)
    rows, columns = linear_sum_assignment(-similarities[:, seats])
    assert similarities[np.arange(12), ours].sum() == pytest.approx(similarities[rows, seats[columns]].sum())
