"""Prompts encoded and scored by the router on a thread of their own, with an LRU cache of the results."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from aptp.router import Router


@dataclass(frozen=True)
class PromptScores:
    """What the router computes for a prompt, for each code in the catalog's order.

    scores: their highest is the prompt's code. similarities: what places the prompt on the map. losses: what the prompt
    is predicted to lose by each code, and price: what the scores take one unit of a code's MACs ratio to be worth in
    loss; both None where the router decides by similarity.
    """

    scores: tuple[float, ...]
    similarities: tuple[float, ...]
    losses: tuple[float, ...] | None = None
    price: float | None = None
    familiarity: float | None = None
    unknown: bool | None = None


def score_prompts(router: Router, prompts: Sequence[str], familiar: float | None) -> list[PromptScores]:
    """Encode and route prompts; familiar: as in `Catalog`."""
    assert router.encoder is not None  # a release without one is not published
    embeddings = router.encoder.encode(prompts).to(router.bias.device)
    routes = router.route_embeddings(embeddings)
    losses = [None] * len(prompts) if routes.losses is None else [tuple(row) for row in routes.losses.tolist()]
    price = None if routes.losses is None else float(router.price)
    return [
        PromptScores(
            tuple(scores), tuple(similarities), lost, price, known, None if familiar is None else known < familiar
        )
        for scores, similarities, lost, known in zip(
            routes.scores.tolist(),
            routes.similarities.tolist(),
            losses,
            router.familiarity(embeddings).tolist(),
            strict=True,
        )
    ]


class RoutingCache:
    """`await cache(prompts)`: a prompt that is requested again, with another seed, is not encoded again.

    Args:
        score: the scores of several prompts; each must depend on its prompt alone.
        size: how many prompts are kept, those that were requested last.
    """

    def __init__(self, score: Callable[[list[str]], Sequence[PromptScores]], *, size: int = 4096) -> None:
        self._score, self._size = score, size
        self._scores: OrderedDict[str, PromptScores] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")  # one: a new thread of torch starts cold

    async def __call__(self, prompts: Sequence[str]) -> list[PromptScores]:
        known = {prompt: self._scores[prompt] for prompt in prompts if prompt in self._scores}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if missing:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, self._score, missing)
            known.update(zip(missing, found, strict=True))
        for prompt, each in known.items():
            self._scores[prompt] = each
            self._scores.move_to_end(prompt)
        while len(self._scores) > self._size:
            self._scores.popitem(last=False)
        return [known[prompt] for prompt in prompts]
