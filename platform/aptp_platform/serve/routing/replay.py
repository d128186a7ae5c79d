"""Yesterday's decisions against another release: who would go elsewhere, and at what cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from aptp.router import Router
from aptp_platform.serve.messages import AUTO, ApiError, Catalog, GenerationRequest
from aptp_platform.serve.release_source import ReleaseSource
from aptp_platform.serve.routing.decision_log import prompt_digest
from aptp_platform.serve.routing.prompt_cache import PromptScores, score_prompts
from aptp_platform.serve.routing.selection import Situation, choose

_BATCH = 256
_READ = (
    "prompt", "prompt_sha256", "model", "routed", "reason", "macs", "budget", "images", "num_inference_steps",
    "unknown",
)  # fmt: skip


@dataclass
class Replay:
    """Sums over the decisions that could be replayed.

    moves: requests by (code then, code now). macs_*: multiply-adds of their images. unknown_*: requests with an unknown
    prompt. hashed: left out, since their prompt is not known. refused: requests that the other release does not serve.
    broken: lines that are none.
    """

    release: str
    moves: Counter[tuple[str, str]] = field(default_factory=Counter)
    macs_before: float = 0.0
    macs_after: float = 0.0
    unknown_before: int = 0
    unknown_after: int = 0
    hashed: int = 0
    refused: int = 0
    broken: int = 0

    @property
    def replayed(self) -> int:
        return self.moves.total()

    @property
    def changed(self) -> int:
        """Requests whose code is another one."""
        return sum(count for (then, now), count in self.moves.items() if then != now)

    def lines(self) -> list[str]:
        """The comparison for a terminal."""
        total = max(1, self.replayed)
        codes = sorted({code for move in self.moves for code in move})
        then, now = Counter[str](), Counter[str]()
        for (first, second), count in self.moves.items():
            then[first] += count
            now[second] += count
        return [
            f"release {self.release}: {self.replayed} decisions replayed, {self.hashed} left out (prompts are hashed), "
            f"{self.refused} refused, {self.broken} broken lines",
            f"another code: {self.changed} ({self.changed / total:.1%})",
            f"multiply-adds: {self.macs_before:.4g} -> {self.macs_after:.4g} "
            f"({self.macs_after / (self.macs_before or 1):.3f} of before)",
            f"unknown prompts: {self.unknown_before / total:.1%} -> {self.unknown_after / total:.1%}",
            *(f"{code}: {then[code] / total:6.1%} -> {now[code] / total:6.1%}" for code in codes),
        ]


def replay(places: Sequence[Path], source: ReleaseSource, prompts: Iterable[str] = ()) -> Replay:
    """Routes the prompts of logged decisions with the router of a release.

    Budgets, prices and asked-for models count; queues and deadlines do not, since yesterday's load is not known.

    Args:
        places: log files, or folders of them.
        prompts: texts that hashed decisions may be of, such as the captions of the training.

    Raises:
        ValueError: there is no log, or no whole release.
    """
    router = Router.load(source.for_router().router_path)
    catalog = source.catalog(with_teacher=source.has_teacher())
    known = {prompt_digest(prompt): prompt for prompt in prompts}
    result = Replay(catalog.release)
    decisions = _readable(_lines(places, result), known, result)
    while batch := list(islice(decisions, _BATCH)):
        texts = list(dict.fromkeys(prompt for prompt, _ in batch))
        scores = dict(zip(texts, score_prompts(router, texts, catalog.familiar), strict=True))
        for prompt, line in batch:
            _compare(line, prompt, scores[prompt], catalog, result)
    return result


def _compare(line: dict[str, Any], prompt: str, scores: PromptScores, catalog: Catalog, result: Replay) -> None:
    steps, images = line["num_inference_steps"], line["images"]
    model = line["model"] if line["reason"] == "asked" else AUTO
    wishes = {"budget": line["budget"], "price": line["price"]}
    request = GenerationRequest(prompt, tuple(range(images)), steps, 0.0, catalog.size, model=model, **wishes)
    try:
        choice = choose(request, scores, Situation(catalog, dict.fromkeys((each.name for each in catalog.models), 1)))
    except ApiError:
        result.refused += 1
        return
    result.moves[line["routed"], choice.routed] += 1
    result.macs_before += line["macs"] * steps * images
    result.macs_after += choice.macs * steps * images
    result.unknown_before += bool(line["unknown"])
    result.unknown_after += bool(choice.unknown)


def _readable(
    lines: Iterable[dict[str, Any]], known: dict[str, str], result: Replay
) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        prompt = line["prompt"]  # "" is one: of a variation
        if prompt is None:
            prompt = known.get(line["prompt_sha256"])
        if prompt is None:
            result.hashed += 1
        else:
            yield prompt, line


def _lines(places: Sequence[Path], result: Replay) -> Iterator[dict[str, Any]]:
    """Every line of the logs; one that a dying process left unfinished is counted."""
    files = [file for place in places for file in (sorted(place.glob("*.jsonl*")) if place.is_dir() else [place])]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        where = ", ".join(missing or map(str, places))
        raise ValueError(f"log: {where}: no decisions there: name a file or folder that decisions.folder wrote")
    for file in files:
        with file.open(encoding="utf-8") as stream:
            for text in stream:
                try:
                    line = json.loads(text)
                    decision = {name: line[name] for name in _READ}
                    decision["price"] = line.get("price")  # logs of older servers know none
                except (ValueError, KeyError, TypeError):
                    result.broken += 1
                else:
                    yield decision
