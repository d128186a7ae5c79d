"""Prompts that arrive together go to their nearest codes as far as those have room: optimal transport by POT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aptp_platform.serve.routing.pot import emd

_FORBIDDEN = 1e6


def place(similarities: Sequence[Sequence[float]], ratios: Sequence[float], rooms: Sequence[float]) -> list[int]:
    """The code of each prompt: its nearest one, or the nearest of at least that one's size that has room.

    The sum of similarity lost is the least there is, once as few prompts as possible must wait; who must wait does so
    at its nearest code.

    Args:
        similarities: of each prompt to each of K codes.
        ratios: the codes' MACs ratios; a prompt never goes to a smaller code (by half a percent).
        rooms: how many more images each code takes, 0 or more; infinity is allowed.
    """
    values = np.asarray(similarities, dtype=np.float64)
    count, codes = values.shape
    home = values.argmax(1)
    room = np.minimum(np.maximum(np.floor(rooms), 0), count)
    if (np.bincount(home, minlength=codes) <= room).all():
        return [int(code) for code in home]
    lost = values[np.arange(count), home][:, None] - values
    waiting = 1 + lost.max()
    sizes = np.asarray(ratios)
    lost[sizes[None, :] < sizes[home][:, None] - 0.005] = _FORBIDDEN
    # One row a prompt and one for the room that is left over; one column a code and one for waiting.
    cost = np.zeros((count + 1, codes + 1))
    cost[:count, :codes], cost[:count, codes] = lost, waiting
    taken = np.append(np.ones(count), room.sum())
    plan = emd(taken, np.append(room, count), cost)
    columns = plan[:count].argmax(1)
    return [int(own if column == codes else column) for column, own in zip(columns, home, strict=True)]
