"""Prompts are scored once while they are in the cache."""

import asyncio

from aptp_platform.serve.routing.prompt_cache import PromptScores, RoutingCache


def test_a_prompt_is_scored_once_while_it_is_cached() -> None:
    asked: list[list[str]] = []

    def score(prompts: list[str]) -> list[PromptScores]:
        asked.append(prompts)
        return [PromptScores((float(len(prompt)),), ()) for prompt in prompts]

    async def main() -> None:
        cache = RoutingCache(score, size=2)

        async def lengths(*prompts: str) -> list[float]:
            return [scores.scores[0] for scores in await cache(prompts)]

        assert await lengths("a", "bbb", "a") == [1, 3, 1]
        assert await lengths("bbb", "cc") == [3, 2]
        assert await lengths("bbb", "a") == [3, 1]  # "a" was the least recently used

    asyncio.run(main())
    assert asked == [["a", "bbb"], ["cc"], ["a"]]
