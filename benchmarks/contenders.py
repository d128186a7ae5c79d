"""The servers of the serving benchmark, all up at once on this machine."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import ray
from ray import serve

from aptp.release import Release
from aptp_platform.run.cluster import ONE_MACHINE, free_ports
from aptp_platform.serve.app import build
from aptp_platform.serve.args import ServeArgs
from benchmarks import noop_chain
from benchmarks.arrivals import Target
from benchmarks.bench_release import PROMPTS

ROOT: Final = Path(__file__).parents[1]
STEPS: Final = 8
GUIDANCE: Final = 7.5


@contextmanager
def ray_serve() -> Iterator[str]:
    """Ray Serve on loopback, without any application; its address."""
    (port,) = free_ports(1)
    os.environ.update(ONE_MACHINE, RAY_USAGE_STATS_ENABLED="0")
    try:
        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=300_000_000,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def noop_applications(base: str, small: Release) -> Iterator[tuple[str, str]]:
    """The server's own path before a no-op expert, and a bare no-op chain: their URLs."""
    serve.run(noop_chain.server(server_args(small)), name="noop", route_prefix="/noop")
    serve.run(noop_chain.chain(), name="chain", route_prefix="/chain")
    yield f"{base}/noop", f"{base}/chain"
    serve.delete("noop")
    serve.delete("chain")


@contextmanager
def contenders(base: str, release: Release) -> Iterator[dict[str, Target]]:
    """Every server under test. The peers are stopped while they are not the ones that are asked: LitServe's idle
    processes take a tenth of this machine."""
    fastapi_port, litserve_port = free_ports(2)
    scripts = (
        (sys.executable, "peer_fastapi.py", fastapi_port),
        (ROOT / ".venv-bench/bin/python", "peer_litserve.py", litserve_port),
    )
    fastapi, litserve = peers = [
        subprocess.Popen(
            [python, ROOT / "benchmarks" / script, release.path, str(port), str(STEPS)], start_new_session=True
        )
        for python, script, port in scripts
    ]
    try:
        serve.run(build(server_args(release, teacher=True)), name="aptp", route_prefix="/")

        def plain(port: int, process: subprocess.Popen[bytes]) -> Target:
            url = f"http://127.0.0.1:{port}/generate"
            return Target(url, lambda prompt, seed: {"prompt": prompt, "seed": seed}, process.pid)

        targets = {
            "experts": _openai(base, "auto"),
            "teacher": _openai(base, "teacher"),
            "fastapi": plain(fastapi_port, fastapi),
            "litserve": plain(litserve_port, litserve),
        }
        for target in targets.values():
            _wait(target, peers)
        for peer in peers:
            os.killpg(peer.pid, signal.SIGSTOP)
        yield targets
    finally:
        for peer in peers:  # with the workers of its own, which outlive a plain SIGTERM
            os.killpg(peer.pid, signal.SIGKILL)
            peer.wait()


@contextmanager
def whole_requests(base: str, release: Release) -> Iterator[Target]:
    """The same server, whose experts batch whole requests. It is gone when it is not compared with: Serve's idle
    processes cannot be stopped."""
    serve.run(build(server_args(release, batching="requests")), name="whole", route_prefix="/whole")
    target = _openai(f"{base}/whole", "auto")
    _wait(target, ())
    yield target
    serve.delete("whole")


def server_args(release: Release, *, teacher: bool = False, batching: str = "steps") -> ServeArgs:
    """One thread a replica: four experts, or the teacher twice, share two cores."""
    expert: dict[str, Any] = {"num_cpus": 0.1, "num_threads": 1, "batching": batching, "max_queued_requests": 500}
    # The measurement at start would meet the start of the others; 4 is what it finds on an idle machine.
    expert["max_batch_size"] = 4
    twice = {**expert, "scaling": {"min_replicas": 2, "max_replicas": 2}}
    small = {"num_cpus": 0.1, "num_threads": 1}
    return ServeArgs.model_validate(
        {
            "release": str(release.path),
            "experts": expert,
            "teacher": twice if teacher else False,
            "router": small,
            "ingress": {"num_cpus": 0.1},
            "images": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE},
        }
    )


def _openai(url: str, model: str) -> Target:
    path = f"{url}/v1/images/generations"
    return Target(path, lambda prompt, seed: {"prompt": prompt, "seed": seed, "model": model})


def _wait(target: Target, peers: Sequence[subprocess.Popen[bytes]], seconds: float = 180.0) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and all(peer.poll() is None for peer in peers):
        try:
            if httpx.post(target.url, json=target.body(PROMPTS[0], 0), timeout=60).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"error: {target.url} did not answer within {seconds:g} s, or a peer ended; see its output above")
