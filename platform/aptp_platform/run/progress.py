"""Progress of a job: a bar on a terminal, elsewhere a line every few seconds, which `parse_line` reads back."""

import re
import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

LINE_SECONDS = 3.0
_LINE = re.compile(r"\[([\w-]+)\] (\d+)/(\d+)(?: (.*))?")


@dataclass(frozen=True)
class Line:
    """One printed line: `[name] done/total facts`."""

    name: str
    done: int
    total: int
    facts: str

    def __str__(self) -> str:
        return f"[{self.name}] {self.done}/{self.total} {self.facts}".rstrip()


def parse_line(text: str) -> Line | None:
    """What a `Progress` printed; None if it is another line."""
    match = _LINE.fullmatch(text)
    return Line(match[1], int(match[2]), int(match[3]), match[4] or "") if match else None


class Progress:
    """Progress of one long piece of work; used as a `with` block, and `update` is cheap enough for every step.

    Off a terminal it prints `[name] done/total fact=value ... eta=12s`, at the start, at the end and at most every
    `LINE_SECONDS` between.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self._started = self._printed = time.monotonic()
        self._first: int | None = None
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self._bar = Bar(*columns, TimeRemainingColumn())
            self._task = self._bar.add_task(name, total=total, facts="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, **facts: float | str) -> None:
        """Report that `done` of `total` are done, and facts to show beside it."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
        shown = " ".join(f"{name}={_short(value)}" for name, value in facts.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=shown)
        elif done >= self.total or done == self._first or now - self._printed >= LINE_SECONDS:
            self._printed = now
            rate = (done - self._first) / max(now - self._started, 1e-9)
            left = f" eta={(self.total - done) / rate:.0f}s" if rate > 0 and done < self.total else ""
            print(Line(self.name, done, self.total, f"{shown}{left}"), flush=True)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
