"""What the router does with prompts that come together, and with those that it knows."""

import asyncio

import pytest

from aptp_platform.serve.finding import Finder
from aptp_platform.serve.gathering import Gathering
from aptp_platform.serve.selection import Found


def test_one_is_answered_at_once_and_those_that_come_meanwhile_together() -> None:
    batches: list[list[int]] = []

    async def double(questions: list[int]) -> list[int]:
        batches.append(questions)
        await asyncio.sleep(0.01)
        return [2 * question for question in questions]

    async def main() -> list[int]:
        gathering = Gathering(double, largest=3)
        first = asyncio.ensure_future(gathering(0))
        await asyncio.sleep(0.005)
        others = [asyncio.ensure_future(gathering(number)) for number in range(1, 6)]
        answers = await asyncio.gather(first, *others)
        assert await gathering(6) == 12  # and again, when nobody was there
        return answers

    assert asyncio.run(main()) == [0, 2, 4, 6, 8, 10]
    assert batches == [[0], [1, 2, 3], [4, 5], [6]]


def test_a_failure_is_that_of_its_batch_alone_and_who_left_is_not_asked_for() -> None:
    asked: list[list[str]] = []

    async def answer(questions: list[str]) -> list[str]:
        asked.append(questions)
        await asyncio.sleep(0.01)
        if "bad" in questions:
            raise ValueError("bad")
        return questions

    async def main() -> None:
        gathering = Gathering(answer, largest=8)
        bad = asyncio.ensure_future(gathering("bad"))
        await asyncio.sleep(0.005)
        good, leaves = (asyncio.ensure_future(gathering(name)) for name in ("good", "leaves"))
        await asyncio.sleep(0)
        leaves.cancel()
        with pytest.raises(ValueError, match="bad"):
            await bad
        assert await good == "good"

    asyncio.run(main())
    assert asked == [["bad"], ["good"]]


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
