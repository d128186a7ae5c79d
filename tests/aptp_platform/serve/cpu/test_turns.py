"""Turns: how many at once, whose is next, and that nothing that dies or hangs keeps one."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aptp_platform.serve.cpu.turns import Turns, turns_if_cheap
from aptp_platform.serve.engine.batching import StepEngine
from aptp_platform.serve.engine.denoising import Denoiser, SampleSpec
from tests.support.tiny_pipeline import build_pipeline

HOLDER = """
import sys, time
from aptp_platform.serve.cpu.turns import Turns
assert Turns("test", 1).acquire(0.0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Turns of this test's own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for other processes
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def held(turns: Turns, since: float) -> Iterator[None]:
    assert turns.acquire(since)
    yield
    turns.release()


def test_no_more_compute_at_once_than_have_a_turn() -> None:
    computing: list[int] = []
    most = 0

    def replica(number: int) -> None:
        nonlocal most
        turns = Turns("test", 2)  # as every process has its own
        for _ in range(5):
            with held(turns, time.monotonic()):
                computing.append(number)
                most = max(most, len(computing))
                time.sleep(0.005)
                computing.remove(number)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(replica, range(5)))
    assert most == 2


def test_the_next_turn_is_that_of_the_oldest_request_whenever_it_was_asked_for() -> None:
    order: list[float] = []

    def replica(place: int, since: float) -> None:
        time.sleep(0.05 * place)
        with held(Turns("test", 1), since):
            order.append(since)
            time.sleep(0.4 if since == 9.0 else 0)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(replica, range(5), (9.0, 3.0, 1.0, 4.0, 2.0)))
    assert order == [9.0, 1.0, 2.0, 3.0, 4.0]


def test_whoever_gives_a_turn_back_and_wants_the_next_is_ranked_already() -> None:
    returns, waits = Turns("test", 1), Turns("test", 1)
    with ThreadPoolExecutor(1) as other:
        assert returns.acquire(1.0)
        granted = other.submit(waits.acquire, 2.0)
        time.sleep(0.05)
        returns.release(next_since=1.5)
        time.sleep(0.05)
        assert not granted.done()
        assert returns.acquire(1.5)
        returns.release(next_since=3.0)
        assert granted.result(5)  # before `returns`, whose claim is still there
    waits.release()
    assert Turns("test", 1, patience_s=2).acquire(9.0), "a claim that nobody renews does not count"


def test_a_killed_replica_s_turn_is_free_again_and_a_hanging_one_holds_nobody_up_for_ever() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert not Turns("test", 1, patience_s=0.1).acquire(1.0)
        holder.send_signal(signal.SIGKILL)
    assert Turns("test", 1, patience_s=5).acquire(1.0)


def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    (folder / f"aptp-turns-{os.getuid()}-test-1").symlink_to(folder)
    with pytest.raises(ValueError, match=r"^turns: .*: cannot be shared \(it belongs to somebody else\); set turns to"):
        Turns("test", 1)


def test_turns_are_taken_where_asking_is_cheap() -> None:
    assert turns_if_cheap("test", 1, lambda: time.sleep(0.5)) is not None
    assert turns_if_cheap("test", 1, lambda: None) is None


def test_an_engine_computes_in_its_turn_alone_and_gives_it_back() -> None:
    pipe: Any = build_pipeline()
    denoiser = Denoiser(pipe.unet, pipe.vae, pipe.tokenizer, pipe.text_encoder, pipe.scheduler)
    spec = SampleSpec("a cat", seed=1, num_inference_steps=3, guidance_scale=1.0, size=(16, 16))

    async def scenario() -> None:
        other = Turns("test", 1)
        assert other.acquire(0.0)
        engine = StepEngine(denoiser, max_batch_size=2, max_waiting=2, turns=Turns("test", 1))
        image = asyncio.create_task(engine.generate(spec))
        done, _ = await asyncio.wait([image], timeout=0.5)
        assert not done, "it computed in another's turn"
        other.release()
        await image
        assert other.acquire(time.monotonic()), "nothing is wanted of the turn that it gave back"
        other.release()
        await engine.close()

    asyncio.run(scenario())
