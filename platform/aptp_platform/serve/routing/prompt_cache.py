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
    """What the router computes for a prompt. similarities: to each code, in the catalog's order."""

    similarities: tuple[float, ...]
    familiarity: float | None = None
    unknown: bool | None = None


def score_prompts(router: Router, prompts: Sequence[str], familiar: float | None) -> list[PromptScores]:
    """Encode and route prompts; familiar: as in `Catalog`."""
    assert router.encoder is not None  # a release without one is not published
    embeddings = router.encoder.encode(prompts).to(router.bias.device)
    similarities = router.route_embeddings(embeddings).scores.tolist()
    familiarity = router.familiarity(embeddings).tolist()
    return [
        PromptScores(tuple(row), known, None if familiar is None else known < familiar)
        for row, known in zip(similarities, familiarity, strict=True)
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
