"""Turns on a device, and weights packed ahead: how replicas share a machine and what a step costs on it."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aptp_platform.serve.cpu.packing import PackedConv2d, PackedLinear, PatchConv2d, pack_weights
from aptp_platform.serve.cpu.semaphores import Semaphores
from aptp_platform.serve.cpu.turns import Turns
from aptp_platform.serve.engine.batching import StepEngine
from aptp_platform.serve.engine.denoising import Denoiser, SampleSpec
from tests.support.tiny_pipeline import build_pipeline

HOLDER = """
import sys, time
from aptp_platform.serve.cpu.turns import Turns
assert Turns(sys.argv[1], 1).acquire(0.0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device of this test's own; its semaphores and its table are removed, which a server leaves to the next one."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for other processes
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = f"test {os.getpid()} {time.monotonic_ns()}"
    yield name
    for at_once in (1, 2):
        remove(Turns(name, at_once))


def remove(turns: Turns) -> None:
    turns._semaphores.remove()  # as `ipcrm` does


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_no_more_compute_at_once_than_have_a_turn(device: str) -> None:
    computing: list[int] = []
    most = 0

    def replica(number: int) -> None:
        nonlocal most
        turns = Turns(device, 2)  # as every process has its own
        for _ in range(5):
            with turns.held(time.monotonic()):
                computing.append(number)
                most = max(most, len(computing))
                time.sleep(0.002)
                computing.remove(number)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(replica, range(5)))
    assert most == 2


def test_the_next_turn_is_that_of_the_oldest_request_whenever_it_was_asked_for(device: str) -> None:
    order: list[float] = []

    def replica(place: int, since: float) -> None:
        time.sleep(0.05 * place)
        with Turns(device, 1).held(since):
            order.append(since)
            time.sleep(0.3 if since == 9.0 else 0)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(replica, range(5), (9.0, 3.0, 1.0, 4.0, 2.0)))
    assert order == [9.0, 1.0, 2.0, 3.0, 4.0]


def test_whoever_gives_a_turn_back_and_wants_the_next_is_ranked_already(device: str) -> None:
    """Between two steps nobody is in the table who is on the way to its next one."""
    returns, waits = Turns(device, 1), Turns(device, 1)
    with ThreadPoolExecutor(1) as other:
        assert returns.acquire(1.0)
        granted = other.submit(waits.acquire, 2.0)
        while waits._claims.oldest() is None:
            time.sleep(0.01)
        returns.release(next_since=1.5)
        time.sleep(0.1)
        assert not granted.done()
        assert returns.acquire(1.5)
        returns.release(next_since=3.0)
        assert granted.result(5)  # before `returns`, whose claim is still there
        waits.release()
    assert returns.is_claimed
    returns.withdraw()
    assert Turns(device, 1, patience_s=0.1).acquire(9.0)


class _Recorded(Turns):
    """Turns that write down what they are asked for."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.promised: list[float | None] = []

    is_claimed = False

    @contextmanager
    def held(self, since: float, then: Callable[[], float | None] = lambda: None) -> Iterator[None]:
        self.asked.append(since)
        yield
        self.promised.append(then())


def test_every_step_that_a_request_was_given_sets_it_back_by_one_step_of_the_whole_network() -> None:
    pipeline, turns = build_pipeline(), _Recorded()
    denoiser = Denoiser(pipeline.unet, pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, pipeline.scheduler)

    async def main() -> StepEngine:
        engine = StepEngine(denoiser, max_batch_size=1, max_waiting=1, turns=turns, step_cost=0.5)
        await asyncio.gather(*(engine.generate(SampleSpec("a cat", seed, 3, 1.0, (16, 16))) for seed in (1, 2)))
        return engine

    engine = asyncio.run(main())
    came, step_s = turns.asked[0], 2 * engine._least_step_s
    assert len(turns.asked) == 6
    # The second came right after the first and has nothing yet: it is who is furthest behind until it is served too.
    assert turns.asked[1] == pytest.approx(turns.asked[2])
    assert came < turns.asked[1] < came + 0.05
    served = [since - turns.asked[1] for since in turns.asked[3:]]
    assert served[0] == 0
    assert served[1] >= step_s  # which is the least so far, and falls
    assert served[2] >= 2 * step_s
    assert turns.promised == [*turns.asked[1:], None]


def test_a_request_of_many_steps_lets_short_ones_pass(device: str) -> None:
    pipeline = build_pipeline()
    ends: list[str] = []

    async def order(engine: StepEngine, name: str, steps: int) -> None:
        await engine.generate(SampleSpec("a cat", 1, steps, 1.0, (16, 16)))
        ends.append(name)

    async def main() -> None:
        denoisers = [
            Denoiser(pipeline.unet, pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, pipeline.scheduler)
            for _ in range(2)
        ]
        long, short = (
            StepEngine(denoiser, max_batch_size=1, max_waiting=9, turns=Turns(device, 1)) for denoiser in denoisers
        )
        begun = asyncio.create_task(order(long, "long", 80))
        while not long.cycle_s:
            await asyncio.sleep(0.001)
        await asyncio.gather(begun, *(order(short, "short", 3) for _ in range(3)))
        await asyncio.gather(long.close(), short.close())

    asyncio.run(main())
    assert ends == ["short"] * 3 + ["long"]


def test_a_claim_of_the_dead_holds_nobody_up(device: str) -> None:
    turns = Turns(device, 1)
    assert turns.acquire(0.0)
    with subprocess.Popen([sys.executable, "-c", HOLDER, device]) as waits:
        claims = turns._claims
        while claims.oldest() is None:
            time.sleep(0.01)
        waits.kill()
    turns.release()
    asked = time.monotonic()
    assert Turns(device, 1).acquire(asked)
    assert time.monotonic() - asked < 5


def test_a_killed_process_gives_its_turn_back_and_one_that_hangs_is_passed_by(device: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, device], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            impatient = Turns(device, 1, patience_s=0.1)
            assert not impatient.acquire(time.monotonic())
            holder.send_signal(signal.SIGKILL)
            assert Turns(device, 1, patience_s=10).acquire(time.monotonic())
            Turns(device, 1).release()
        finally:
            holder.kill()


def test_turns_that_were_removed_stop_nobody(device: str, thread: ThreadPoolExecutor) -> None:
    turns = Turns(device, 1, patience_s=10)
    assert turns.acquire(time.monotonic())
    waits = thread.submit(turns.acquire, time.monotonic())
    time.sleep(0.05)
    remove(turns)
    assert not waits.result(timeout=5)
    turns.release()
    assert not turns.acquire(time.monotonic())


def test_turns_that_are_removed_as_they_are_made_are_refused_by_name(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = Semaphores.get

    def get_from_nothing(self: Semaphores, which: int) -> int:
        self.remove()
        return get(self, which)

    with monkeypatch.context() as patch:
        patch.setattr(Semaphores, "get", get_from_nothing)
        with pytest.raises(ValueError, match="leave 'turns' unset"):
            Turns(device, 1)


def test_an_engine_that_is_closed_while_it_waits_keeps_no_turn(device: str) -> None:
    pipeline, turns = build_pipeline(), Turns(device, 1, patience_s=10)
    denoiser = Denoiser(pipeline.unet, pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, pipeline.scheduler)
    assert turns.acquire(0.0)

    async def main() -> None:
        engine = StepEngine(denoiser, max_batch_size=1, max_waiting=1, turns=Turns(device, 1))
        with engine.submit(SampleSpec("a cat", 1, 2, 1.0, (16, 16))):
            await asyncio.sleep(0.1)
            closing = asyncio.create_task(engine.close())
            await asyncio.sleep(0.1)
            turns.release()
            await asyncio.wait_for(closing, 5)

    asyncio.run(main())
    assert turns.acquire(0.0)
    turns.release()


@torch.inference_mode()
def test_a_packed_network_answers_as_its_source_for_any_batch_and_size() -> None:
    source, packed = (build_pipeline().unet for _ in range(2))
    packed.load_state_dict(source.state_dict())
    dim = source.config.cross_attention_dim

    def inputs(rows: int, height: int, width: int, tokens: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(rows, 4, height, width), torch.arange(rows) * 100, torch.randn(rows, tokens, dim)

    pack_weights([packed], lambda: packed(*inputs(2, 8, 8, 4)))
    kinds = {type(module) for module in packed.modules()}
    assert {PackedConv2d, PatchConv2d, PackedLinear} <= kinds
    assert nn.Linear not in kinds
    for given in (inputs(1, 8, 8, 3), inputs(5, 8, 8, 77), inputs(20, 8, 8, 4), inputs(3, 8, 16, 4)):
        torch.testing.assert_close(packed(*given).sample, source(*given).sample, rtol=1e-4, atol=1e-5)


def test_what_has_no_packed_kernel_is_left_alone() -> None:
    kept = nn.Sequential(
        nn.Linear(4, 4).half(),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    )
    before = list(kept)
    pack_weights([kept], lambda: None)
    assert all(one is other for one, other in zip(kept, before, strict=True))


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"stride": (1, 2), "padding": (2, 0)}])
@torch.inference_mode()
def test_a_convolution_over_patches_is_the_convolution(geometry: dict[str, Any]) -> None:
    source = nn.Conv2d(5, 7, (3, 2), **geometry)
    patches = PatchConv2d(source)
    for size in ((2, 5, 4, 5), (1, 5, 3, 2), (3, 5, 9, 11)):
        images = torch.randn(size)
        torch.testing.assert_close(patches(images), source(images), rtol=1e-4, atol=1e-5)
