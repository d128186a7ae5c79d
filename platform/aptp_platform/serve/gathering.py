"""Answers in batches: while one batch is answered the next gathers, and nobody waits for company.

`serve.batch` does this too, through a queue and a task of its own, which cost a lone prompt half a millisecond.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Gathering(Generic[Question, Answer]):
    """`await gathering(question)` is the question's answer.

    Args:
        answer: the answers to questions that came together, in their order; what it raises, all of them raise.
        largest: questions that are answered together.
    """

    def __init__(self, answer: Callable[[list[Question]], Awaitable[list[Answer]]], largest: int) -> None:
        self._answer, self._largest = answer, largest
        self._waiting: deque[tuple[Question, asyncio.Future[Answer]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, question: Question) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer_all())
        return await future

    async def _answer_all(self) -> None:
        while self._waiting:
            count = min(self._largest, len(self._waiting))
            together = [self._waiting.popleft() for _ in range(count)]
            asked = [(question, future) for question, future in together if not future.cancelled()]
            if not asked:
                continue
            try:
                answers = await self._answer([question for question, _ in asked])
            except Exception as fault:
                for _, future in asked:
                    if not future.done():
                        future.set_exception(fault)
                continue
            for (_, future), answer in zip(asked, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
