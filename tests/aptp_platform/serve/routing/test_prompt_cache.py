"""What the router remembers of prompts."""

import asyncio

from aptp_platform.serve.routing.prompt_cache import Finder
from aptp_platform.serve.routing.selection import Found


def test_a_prompt_is_encoded_once_while_it_is_remembered() -> None:
    asked: list[list[str]] = []

    def find(prompts: list[str]) -> list[Found]:
        asked.append(prompts)
        return [Found((float(len(prompt)),)) for prompt in prompts]

    async def main() -> None:
        finder = Finder(find, remembered=2)

        async def lengths(*prompts: str) -> list[float]:
            return [found.similarities[0] for found in await finder(prompts)]

        assert await lengths("a", "bbb", "a") == [1, 3, 1]
        assert await lengths("bbb", "cc") == [3, 2]
        assert await lengths("bbb", "a") == [3, 1]  # "a" was the one that nobody had asked for lately

    asyncio.run(main())
    assert asked == [["a", "bbb"], ["cc"], ["a"]]
