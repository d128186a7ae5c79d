"""Prompts that arrive together go to their best codes as far as those have room: optimal transport by POT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int

from aptp_platform.serve.routing.pot import emd

MOST_LOSS: Final = 1.1  # of a code that stands in, relative to the home's loss for the same prompt
SMALLER: Final = 0.005  # by which a MACs ratio is still of the same size


def place(
    scores: Sequence[Sequence[float]],
    ratios: Sequence[float],
    rooms: Sequence[float],
    losses: Sequence[Sequence[float]] | None = None,
) -> list[int]:
    """The code of each prompt: its home, the code with its highest score, or one that may stand in and has room.

    A code may stand in for the home where the prompt is predicted to lose at most `MOST_LOSS` times as much by it; or,
    without predictions, where the code is not smaller than the home.

    The sum of score lost is the least there is, once as few prompts as possible must wait; who must wait does so at
    home.

    Args:
        scores: of each prompt for each of K codes.
        ratios: the codes' MACs ratios.
        rooms: how many more images each code takes, 0 or more; infinity is allowed.
        losses: what each prompt is predicted to lose by each code; None from a router by similarity.
    """
    values = np.asarray(scores, dtype=np.float64)
    count, codes = values.shape
    home = values.argmax(1)
    room = np.minimum(np.maximum(np.floor(rooms), 0), count)
    if (np.bincount(home, minlength=codes) <= room).all():
        return [int(code) for code in home]
    lost = values[np.arange(count), home][:, None] - values
    lost /= lost.max() or 1  # whatever its unit
    waiting = count + 1.0  # more than all others can lose by making room
    lost[~_may_stand_in(home, np.asarray(ratios), None if losses is None else np.asarray(losses))] = 2 * waiting
    # One row a prompt and one for the room that is left over; one column a code and one for waiting.
    cost = np.zeros((count + 1, codes + 1))
    cost[:count, :codes], cost[:count, codes] = lost, waiting
    taken = np.append(np.ones(count), room.sum())
    plan = emd(taken, np.append(room, count), cost)
    columns = plan[:count].argmax(1)
    return [int(own if column == codes else column) for column, own in zip(columns, home, strict=True)]


def _may_stand_in(
    home: Int[np.ndarray, " prompt"],
    ratios: Float[np.ndarray, " code"],
    losses: Float[np.ndarray, "prompt code"] | None,
) -> Bool[np.ndarray, "prompt code"]:
    if losses is None:
        return ratios[None, :] >= ratios[home][:, None] - SMALLER
    return losses <= MOST_LOSS * np.take_along_axis(losses, home[:, None], axis=1)
