"""Overflow as a transport problem: checked against scipy's exact assignment and against its own rules."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from aptp_platform.serve.routing.overflow import MOST_LOSS, place

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


def test_by_predicted_loss_a_smaller_code_may_stand_in_and_a_bad_one_may_not() -> None:
    losses = [(1.0, MOST_LOSS - 0.01, MOST_LOSS + 0.01)]
    assert place([(0.9, 0.7, 0.8)], (0.7, 0.5, 0.9), (0, 1, 1), losses) == [1], "code 2 would cost less score"
    assert place([(0.9, 0.7, 0.8)], (0.7, 0.5, 0.9), (0, 0, 1), losses) == [0], "it waits at home"
    assert place([(0.9, 0.7, 0.8)], (0.7, 0.5, 0.9), (0, 1, 1)) == [2], "by similarity, size decides what may"


@pytest.mark.parametrize("unit", [1e-5, 1e3])
@pytest.mark.parametrize("seed", range(4))
def test_losses_of_any_unit_are_weighed_exactly_among_the_codes_that_may_stand_in(seed: int, unit: float) -> None:
    """Seats as below, and one at home for each prompt at a price of waiting that outweighs all that can be lost."""
    rng = np.random.default_rng(seed)
    losses = unit * (1 + 0.3 * rng.random((12, 4)))
    scores = 0.1 * unit * rng.random((12, 4)) - 0.1 * losses
    rooms = np.array([4, 3, 2, 1])
    home, rows = scores.argmax(1), np.arange(12)
    ours = np.array(place(scores.tolist(), (0.5,) * 4, rooms.tolist(), losses.tolist()))
    allowed = losses <= MOST_LOSS * losses[rows, home][:, None]
    assert allowed[rows, ours].all()

    lost = (scores.max(1)[:, None] - scores) / unit
    seats = np.repeat(np.arange(4), rooms)
    cost = np.hstack([np.where(allowed, lost, 1e3)[:, seats], np.full((12, 12), 1e2)])
    best, columns = linear_sum_assignment(cost)
    seated = columns < len(seats)
    assert np.maximum(np.bincount(ours, minlength=4) - rooms, 0).sum() == (~seated).sum()
    assert lost[rows, ours].sum() == pytest.approx(cost[best, columns][seated].sum())


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
