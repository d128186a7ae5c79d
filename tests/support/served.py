"""One small release behind real HTTP for the tests: two codes and the teacher, started once a session."""

import base64
import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image
from ray import serve
from ray.exceptions import RayActorError

from aptp.pipeline import AptpPipeline
from aptp.release import Release
from aptp_platform.run.cluster import free_ports
from aptp_platform.serve.app import build
from aptp_platform.serve.args import ServeArgs
from tests.support.tiny_release import build_release

STEPS, GUIDANCE = 4, 3.0
PROMPTS = ("a red cat", "a house by the sea", "blue", "an old car in front of a very tall tower")


@dataclass(frozen=True)
class Served:
    """A server, and what it serves."""

    url: str
    args: ServeArgs
    release: Release
    library: AptpPipeline


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Starts the server on the running cluster; the fixture `served` of `conftest`."""
    release = build_release(folder / "release", num_codes=2, with_teacher=True, routing="need")
    small = {"num_cpus": 0.1, "num_threads": 1}
    args = ServeArgs.model_validate(
        {
            "release": str(release.path),
            "teacher": True,
            "experts": {**small, "max_batch_size": 4, "max_waiting": 4, "max_queued_requests": 8},
            "router": {**small, "target_ms": 800.0},
            "ingress": {"num_cpus": 0.1, "body_timeout_s": 1.0},
            "images": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "sizes": ["24x16"]},
            "decisions": {"folder": str(folder / "decisions"), "prompts": "plain"},
        }
    )
    (port,) = free_ports(1)
    with contextlib.suppress(RayActorError, TimeoutError):  # on a starved machine Serve replaces its proxy meanwhile
        serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(args), name="aptp", route_prefix="/")
    _wait_for(f"http://127.0.0.1:{port}/ready")
    yield Served(f"http://127.0.0.1:{port}", args, release, AptpPipeline.from_release(release.path))
    serve.shutdown()


def _wait_for(url: str, seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=10).status_code == httpx.codes.OK:
                return
        time.sleep(0.2)
    raise AssertionError(f"{url} was not ready within {seconds} s")


@pytest.fixture
def url(served: Served) -> str:
    return served.url


@pytest.fixture
def release(served: Served) -> Release:
    return served.release


@pytest.fixture
def args(served: Served) -> ServeArgs:
    return served.args


@pytest.fixture
def library(served: Served) -> AptpPipeline:
    return served.library


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as made:
        yield made


def pixels_of(data: str | None) -> torch.Tensor:
    assert data is not None
    return pixels_of_image(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def pixels_of_image(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3).int()


def expected(library: AptpPipeline, prompt: str, seed: int, **options: Any) -> torch.Tensor:
    made = library([prompt], num_inference_steps=STEPS, guidance_scale=GUIDANCE, seeds=[seed], **options)
    return pixels_of_image(made.images[0])
