"""What the router says of prompts, found on a thread of its own and remembered for a while."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from aptp_platform.serve.routing.selection import Found


class Finder:
    """`await finder(prompts)`: people ask for a prompt again, with another seed, and it is not encoded again.

    Args:
        find: what is said of several prompts, as a function of each alone.
        remembered: prompts, those that were asked for last.
    """

    def __init__(self, find: Callable[[list[str]], Sequence[Found]], *, remembered: int = 4096) -> None:
        self._find, self._remembered = find, remembered
        self._found: OrderedDict[str, Found] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")  # one: a new thread of torch starts cold

    async def __call__(self, prompts: Sequence[str]) -> list[Found]:
        known = {prompt: self._found[prompt] for prompt in prompts if prompt in self._found}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if missing:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, self._find, missing)
            known.update(zip(missing, found, strict=True))
        for prompt, each in known.items():
            self._found[prompt] = each
            self._found.move_to_end(prompt)
        while len(self._found) > self._remembered:
            self._found.popitem(last=False)
        return [known[prompt] for prompt in prompts]
