"""What routing, pruned experts and step-level batching bring a server, as ratios measured in one run.

    make bench-serve            goes on where it was interrupted; FRESH=1 starts over

The servers that are compared are up at once and take turns, trace by trace, so that whatever else the machine does
meets them alike.
Requests are sent when a trace says and timed from then; the traces of all servers are the same. Goodput is the largest
rate, in twentieths of the server's own capacity, at which 99 % are answered within the target: three times what the
teacher's image takes alone on the plain FastAPI server.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import torch

from aptp.release import Release
from aptp_platform.serve.messages import GenerationRequest
from aptp_platform.serve.release_source import ReleaseSource
from aptp_platform.serve.routing.prompt_cache import score_prompts
from aptp_platform.serve.routing.router import load_prompt_router
from aptp_platform.serve.routing.selection import Situation, decide
from benchmarks.arrivals import Kind, Outcome, Target, Trace, capacity, play
from benchmarks.bench_release import PROMPTS, bench_release
from benchmarks.contenders import GUIDANCE, STEPS, contenders, noop_applications, ray_serve, whole_requests

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks/results/serve.json"
SEEDS: Final = (0, 1, 2)
PEERS: Final = ("fastapi", "litserve")
KINDS: Final[tuple[Kind, ...]] = ("poisson", "bursty")
GRAIN: Final = 0.05  # of a server's own capacity, by which the rates that are tried differ
ROUNDS: Final = 3  # of capacities and tails: one capacity was seen to be a fifth off, one p99 a third
START, MOST = 16, 24  # grains: tried first; more than the capacity can be met for as long as a trace
IN_TIME: Final = 0.99
SLOWER: Final = 3.0  # the target, in images of an idle plain server


class Measurements:
    """Numbers that are measured once: a run that was interrupted goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self._done:
            self._done[name] = measure()
            scratch = self._path.with_suffix(".new")
            scratch.write_text(json.dumps(self._done, indent=1))
            scratch.replace(self._path)
            print(f"{time.strftime('%H:%M:%S')} {name}: {_short(self._done[name])}", flush=True)
        return self._done[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-serve", help="release and measurements so far")
    parser.add_argument("--fresh", action="store_true", help="measure all again")
    parser.add_argument("--seconds", type=float, default=24.0, help="of one trace")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    release = bench_release(args.work / "release")
    small = bench_release(args.work / "small-encoder", small_encoder=True)
    known = Measurements(args.work / f"measurements-{args.seconds:g}s.json")
    router = known.get("router", lambda: router_work(release))
    with ExitStack() as stack:
        base = stack.enter_context(ray_serve())
        with noop_applications(base, small) as noops:
            overhead = known.get("overhead", lambda: no_op_overhead(noops))
        targets = stack.enter_context(contenders(base, release))
        bench = Bench(targets, args.seconds, known)
        with whole_requests(base, release) as targets["whole requests"]:
            whole = {kind: bench.tail("whole requests", kind) for kind in KINDS}
        report: dict[str, Any] = {
            "mean MACs ratio": sum(code.ratio * code.share for code in release.codes),
            "router": router,
            "no-op path / Ray Serve's chain, p50": overhead,
            "capacity images/s": bench.capacities(),
            "target s": bench.target_s,
            "arrivals": {},
            "ratios": own_work(router, overhead),
        }
        for kind in KINDS:  # each kind is a result of its own, if the run should be cut short
            tails = {"whole requests": whole[kind], **{peer: bench.tail(peer, kind) for peer in PEERS}}
            goodputs = bench.goodputs(kind)
            report["arrivals"][kind] = {"goodput images/s": goodputs, "p99 s": tails}
            report["ratios"] += ratios(kind, goodputs, tails, report["mean MACs ratio"])
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    for row in report["ratios"]:
        print(f"{'met   ' if row['met'] else 'MISSED'} {row['what']}: {row['value']:.2f} (wanted {row['wanted']})")


class Bench:
    """The open-loop part: which server is tried at which rate with which trace."""

    def __init__(self, targets: dict[str, Target], seconds: float, known: Measurements) -> None:
        self.targets, self.seconds, self.known = targets, seconds, known

    def capacities(self) -> dict[str, float]:
        """Of all servers. Each round asks them in turn, so that a slow minute of the machine is shared; one that is
        gone by now has had its rounds for its tail."""
        for number in range(ROUNDS):
            for name in self.targets:
                self._capacity(name, number)
        return {name: self.capacity(name) for name in self.targets}

    def capacity(self, name: str) -> float:
        """Images a second, the median over the rounds: every rate that is tried is a share of it."""
        return statistics.median(self._capacity(name, number) for number in range(ROUNDS))

    def _capacity(self, name: str, number: int) -> float:
        return float(self.known.get(f"capacity {name}, {number}", partial(warm_capacity, self.targets[name])))

    @property
    def target_s(self) -> float:
        return SLOWER * float(self.known.get("alone", partial(alone_s, self.targets["fastapi"])))

    def goodputs(self, kind: Kind) -> dict[str, float]:
        """Each server's images a second within the target, the mean over the seeds."""
        found: dict[str, list[int]] = {name: [] for name in ("experts", "teacher", *PEERS)}
        for seed in SEEDS:
            for name, grains in found.items():
                grains.append(self._most_grains(name, kind, seed, near=grains[-1] if grains else START))
        return {name: statistics.mean(grains) * GRAIN * self.capacity(name) for name, grains in found.items()}

    def _most_grains(self, name: str, kind: Kind, seed: int, near: int) -> int:
        """The largest rate that is met; the search goes outward from `near` in growing strides, then halves."""
        low, high, grains, stride = 0, MOST + 1, near, 1  # `low` is met, `high` is not
        while high - low > 1:
            if self._is_met(name, Trace(kind, seed, grains * GRAIN * self.capacity(name), self.seconds)):
                low, outward = grains, grains + stride
            else:
                high, outward = grains, grains - stride
            grains = outward if low < outward < high else (low + high) // 2
            stride *= 2
        return low

    def _is_met(self, name: str, trace: Trace) -> bool:
        """Whether 99 % of a trace are answered in time; when that cannot be any more, the rest is not sent."""
        requests, target_s = trace.requests(PROMPTS), self.target_s
        may_be_late = len(requests) - math.ceil(IN_TIME * len(requests))
        outcome = self._play(name, trace, "while it may be met", lambda so_far: so_far.late(target_s) > may_be_late)
        return outcome.late(target_s) <= may_be_late

    def tail(self, peer: str, kind: Kind) -> dict[str, float]:
        """p99 over all seeds at 70 % of a peer's own capacity, of the peer and of the experts behind the same trace.

        The median over the rounds: of some 150 requests it is the slowest or the second slowest, and a slow minute of
        the machine in one of its bursts would decide it.
        """
        found: dict[str, list[float]] = {peer: [], "experts": []}
        for number in range(ROUNDS):
            pooled: dict[str, list[Outcome]] = {name: [] for name in found}
            for seed in SEEDS:
                for name, outcomes in pooled.items():
                    trace = Trace(kind, seed, 0.7 * self.capacity(peer), self.seconds)
                    outcomes.append(self._play(name, trace, f"round {number}"))
            for name, outcomes in pooled.items():
                found[name].append(_pooled(outcomes).percentile(0.99))
        return {name: statistics.median(values) for name, values in found.items()}

    def _play(self, name: str, trace: Trace, why: str, enough: Callable[[Outcome], bool] | None = None) -> Outcome:
        label = f"{name} {trace.kind} seed {trace.seed} at {trace.rate:.3f}/s for {trace.seconds:g} s, {why}"

        def measure() -> dict[str, Any]:
            outcome = play(self.targets[name], trace.requests(PROMPTS), enough)
            return {"latencies": outcome.latencies, "failed": outcome.failed}

        return Outcome(**self.known.get(label, measure))


def ratios(
    kind: Kind, good: dict[str, float], tails: dict[str, dict[str, float]], macs_ratio: float
) -> list[dict[str, Any]]:
    """What pruning, routing and step-level batching bring under one kind of arrivals."""
    rows: list[dict[str, Any]] = []

    def at_least(what: str, value: float, limit: float) -> None:
        rows.append({"what": f"{what}, {kind}", "value": value, "wanted": f">= {limit:.2f}", "met": value >= limit})

    def at_most(what: str, value: float, limit: float) -> None:
        rows.append({"what": f"{what}, {kind}", "value": value, "wanted": f"<= {limit:.2f}", "met": value <= limit})

    at_least("goodput, routed experts / teacher for all, same server", _over(good, "teacher"), 0.9 / macs_ratio)
    for peer in PEERS:
        at_least(f"goodput / {peer} with the teacher", _over(good, peer), 1.4)
        at_most(f"p99 at 70 % of {peer}'s capacity / its own", _over(tails[peer], peer), 0.7)
    at_most("p99, step-level / whole-request batching, at 70 %", _over(tails["whole requests"], "whole requests"), 0.75)
    return rows


def _over(values: dict[str, float], other: str) -> float:
    """The experts' value over another server's; infinite over nothing."""
    return values["experts"] / values[other] if values[other] else math.inf


def own_work(router: dict[str, float], overhead: float) -> list[dict[str, Any]]:
    single, rate = router["one prompt p50 ms"], router["prompts/s batched"]
    return [
        {"what": "router, one prompt, p50 ms", "value": single, "wanted": "<= 10", "met": single <= 10},
        {"what": "router, prompts/s batched", "value": rate, "wanted": ">= 150", "met": rate >= 150},
        {"what": "no-op path / Ray Serve's chain", "value": overhead, "wanted": "<= 1.3", "met": overhead <= 1.3},
    ]


def router_work(release: Release) -> dict[str, float]:
    """Encode and assign, on one core."""
    torch.set_num_threads(1)
    router = load_prompt_router(release)
    catalog = ReleaseSource(str(release.path)).catalog(with_teacher=False)
    idle = Situation(catalog, dict.fromkeys((model.name for model in catalog.models), 1))

    def work(prompts: tuple[str, ...]) -> float:
        started = time.perf_counter()
        requests = [GenerationRequest(prompt, (0,), STEPS, GUIDANCE, catalog.size) for prompt in prompts]
        decide(requests, score_prompts(router, prompts, catalog.familiar), idle)
        return time.perf_counter() - started

    work(PROMPTS[:32])
    single = statistics.median(work((prompt,)) for prompt in PROMPTS[:100])
    batched = statistics.median(work(PROMPTS[index : index + 32]) for index in range(0, len(PROMPTS) - 31, 32))
    return {"one prompt p50 ms": 1e3 * single, "prompts/s batched": 32 / batched}


def no_op_overhead(targets: tuple[str, str], rounds: int = 8, each: int = 40) -> float:
    """p50 of the server's path over the bare chain's, one request after the other, in turns.

    The prompt is one that the router remembers: what it does for a new one is measured by `router_work`."""
    times: dict[str, list[float]] = {url: [] for url in targets}
    with httpx.Client(timeout=60) as http:
        for number in range(rounds + 1):
            for url, values in times.items():
                for _ in range(each):
                    started = time.perf_counter()
                    http.post(f"{url}/v1/images/generations", json={"prompt": "a cat"}).raise_for_status()
                    if number:  # the first round warms up
                        values.append(time.perf_counter() - started)
    ours, bare = (statistics.median(values) for values in times.values())
    return ours / bare


def warm_capacity(target: Target) -> float:
    """Images a second when all is loaded and compiled that the first requests load and compile."""
    capacity(target, 4, PROMPTS)
    return capacity(target, 15, PROMPTS)


def alone_s(target: Target) -> float:
    """Seconds of an image on an idle server."""
    times = []
    with target.awake(), httpx.Client(timeout=60) as http:
        for seed in range(6):
            started = time.perf_counter()
            http.post(target.url, json=target.body(PROMPTS[seed], seed)).raise_for_status()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _pooled(outcomes: list[Outcome]) -> Outcome:
    return Outcome([each for outcome in outcomes for each in outcome.latencies], sum(each.failed for each in outcomes))


def _short(value: Any) -> str:
    if isinstance(value, dict) and "latencies" in value:
        outcome = Outcome(**value)
        return f"{len(outcome.latencies)} answered, {outcome.failed} failed, p99 {outcome.percentile(0.99):.2f} s"
    return json.dumps(value)


if __name__ == "__main__":
    main()
