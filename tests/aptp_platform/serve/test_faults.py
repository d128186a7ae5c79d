"""Load and faults: what those who are served notice when replicas die, clients leave, queues fill, releases change."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from aptp.pipeline import AptpPipeline
from aptp.release import Release
from aptp_platform.serve.app import build
from aptp_platform.serve.args import ServeArgs
from aptp_platform.serve.http.keys import make_key
from tests.support import load
from tests.support.served import (
    GUIDANCE,
    PROMPTS,
    args,
    client,
    expected,
    http,
    library,
    pixels_of,
    pixels_of_image,
    release,
    url,
)
from tests.support.tiny_release import build_release

__all__ = ["args", "client", "http", "library", "release", "url"]  # fixtures


@pytest.fixture(scope="module", autouse=True)
def last_of_the_server(served: Any) -> Iterator[None]:
    from ray import serve

    yield
    serve.shutdown()


@contextmanager
def meanwhile(changed: ServeArgs, args: ServeArgs) -> Iterator[None]:
    """The server as `changed` says, and afterwards again as the other tests expect it."""
    from ray import serve

    serve.run(build(changed), name="aptp", route_prefix="/")
    try:
        yield
    finally:
        serve.run(build(args), name="aptp", route_prefix="/")


def test_an_overflowing_queue_is_a_429_that_says_when(url: str) -> None:
    body = {"prompt": "a cat", "model": "code-00", "num_inference_steps": 60}

    def draw(_: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(draw, range(24)))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert load.running(url) == 0


def test_prompts_that_would_wait_too_long_at_their_code_are_served_by_a_larger_neighbour(
    url: str, args: ServeArgs, release: Release, library: AptpPipeline
) -> None:
    target_ms = args.router.target_ms
    assert target_ms is not None
    small = min(range(2), key=lambda index: release.codes[index].ratio)
    body: dict[str, Any] = {
        "prompt": next(each for each in PROMPTS if int(library.router.route([each]).indices[0]) == small)
    }
    for model in ("code-00", "code-01"):
        timed = {**body, "model": model, "num_inference_steps": 40}
        httpx.post(f"{url}/v1/images/generations", json=timed, timeout=60).raise_for_status()
    models = httpx.get(f"{url}/ready").json()["models"]
    step_ms = max(models[model]["step_ms"] for model in ("code-00", "code-01"))
    body["num_inference_steps"] = max(1, min(99, int(0.6 * target_ms / step_ms)))

    def draw(_: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

    with ThreadPoolExecutor(18) as threads:
        answers = list(threads.map(draw, range(18)))
    assert {answer.status_code for answer in answers} == {200}
    went = {(answer.headers["x-aptp-reason"], answer.headers["x-aptp-code"]) for answer in answers}
    assert went == {("routed", f"code-{small:02d}"), ("overflow", f"code-{1 - small:02d}")}


def test_replicas_that_are_killed_under_load_cost_nobody_an_image(
    url: str, http: httpx.Client, library: AptpPipeline
) -> None:
    prompt = next(
        each for each in PROMPTS if not library.router.route([each]).indices[0]
    )  # the library routes to 00 too
    body = {"prompt": prompt, "model": "code-00", "num_inference_steps": 60}
    wanted = library([prompt] * 2, num_inference_steps=60, guidance_scale=GUIDANCE, seeds=[0, 1]).images

    def kill() -> None:
        for name in ("Expert-00", "Router"):
            while load.running(url) < 6:
                time.sleep(0.02)
            (process,) = load.replicas(name)
            process.kill()

    for asked, answer in load.during(url, [{**body, "seed": seed} for seed in (0, 1)], kill, at_once=6, after_s=0):
        assert answer.status_code == 200, answer.text
        pixels = pixels_of(answer.json()["data"][0]["b64_json"])
        assert (pixels - pixels_of_image(wanted[asked["seed"]])).abs().max() <= 1


def test_those_who_hang_up_leave_no_work_behind(url: str, http: httpx.Client, soak: bool) -> None:
    body = {"prompt": "a cat", "model": "code-01", "num_inference_steps": 99}
    for _ in range(5 if soak else 1):
        load.hang_up(url, body, clients=200 if soak else 24)
        assert load.settles(lambda: load.running(url) == 0, 5.0)
    assert http.post("/v1/images/generations", json={**body, "num_inference_steps": 2}).status_code == 200


def test_overload_is_429s_beyond_the_queue_and_over_when_it_ends(url: str, soak: bool) -> None:
    body = {"prompt": "a cat", "model": "code-00", "num_inference_steps": 30}
    told = load.overload(url, body, seconds=60 if soak else 4)
    assert set(told.statuses) == {200, 429}, told
    assert told.slowest_s < 30, "who is let in is served, nobody runs into a timeout"
    assert told.memory_growth < 0.1, told
    assert told.recovery_s < 5
    assert load.settles(lambda: load.running(url) == 0, 5.0)


def test_the_client_s_own_retries_bring_a_refused_order_through(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=120) as patient:

        def draw(_: int) -> int:
            answer = patient.images.generate(prompt="a cat", model="code-00", extra_body={"num_inference_steps": 20})
            return len(answer.data or ())

        with ThreadPoolExecutor(24) as threads:
            assert sum(threads.map(draw, range(24))) == 24


def test_a_deadline_that_the_queue_breaks_should_log_at_once(url: str, http: httpx.Client) -> None:
    """Behind a full batch of long requests; without them it would be met."""
    long = {"prompt": "a cat", "model": "code-00", "num_inference_steps": 60}
    http.post("/v1/images/generations", json=long).raise_for_status()
    step_ms = http.get("/ready").json()["models"]["code-00"]["step_ms"]
    with ThreadPoolExecutor(5) as threads:
        busy = [threads.submit(httpx.post, f"{url}/v1/images/generations", json=long, timeout=60) for _ in range(5)]
        assert load.settles(lambda: load.running(url) == len(busy), 10)
        body = {**long, "num_inference_steps": 1, "deadline_ms": 10 * step_ms}
        answer = http.post("/v1/images/generations", json=body)
        assert not any(each.done() for each in busy), "while the others still run"
        assert answer.status_code == 429, answer.text
        assert answer.json()["error"]["param"] == "deadline_ms"
        assert int(answer.headers["retry-after"]) >= 1
        assert [each.result().status_code for each in busy] == [200] * len(busy)


def test_a_sleeping_code_is_served_by_its_neighbour_and_woken_and_keys_are_asked_for(
    url: str, args: ServeArgs, release: Release, library: AptpPipeline, tmp_path: Path, soak: bool
) -> None:
    if not soak:
        pytest.skip("Serve takes its time to scale to zero: make soak")
    token, entry = make_key("tester", macs_per_second=1e15)
    (tmp_path / "keys.json").write_text(f"[{entry.model_dump_json()}]")
    small = min(range(2), key=lambda index: release.codes[index].ratio)
    asleep = {"min_replicas": 0, "downscale_delay_s": 1.0, "look_back_period_s": 11.0}
    changed = ServeArgs.model_validate(
        {
            **args.model_dump(),
            "codes": {small: {"scaling": asleep}},
            "keys": {"required": True, "file": str(tmp_path / "keys.json")},
        }
    )
    prompt = next(each for each in PROMPTS if int(library.router.route([each]).indices[0]) == small)
    with (
        meanwhile(changed, args),
        httpx.Client(base_url=url, timeout=120) as stranger,
        httpx.Client(base_url=url, timeout=120, headers={"authorization": f"Bearer {token}"}) as known,
    ):
        assert stranger.post("/v1/route", json={"prompt": prompt}).status_code == 401

        def ask() -> str:
            answer = known.post("/v1/images/generations", json={"prompt": prompt})
            assert answer.status_code == 200, answer.text
            assert float(answer.headers["x-ratelimit-remaining-macs"]) > 0
            return answer.headers["x-aptp-reason"]

        name = f"code-{small:02d}"
        assert load.settles(lambda: known.get("/ready").json()["models"][name]["replicas"] == 0, 120)
        assert ask() == "cold", "its neighbour serves at once"
        assert load.settles(lambda: ask() == "routed", 60), "and it was woken meanwhile"


def test_another_release_is_rolled_out_under_load_without_a_failed_request(
    url: str, args: ServeArgs, library: AptpPipeline, tmp_path: Path
) -> None:
    """An image is the old or the new release's of its prompt: none is of one's code by the other's expert."""
    from ray import serve

    successor = build_release(tmp_path / "release", num_codes=2, with_teacher=False, seed=1)
    libraries = [library, AptpPipeline.from_release(successor.path)]
    requests = [(prompt, seed) for prompt in PROMPTS for seed in (1, 2)]
    wanted = {request: [expected(each, *request) for each in libraries] for request in requests}
    router = args.router.model_copy(update={"target_ms": None})  # or a busy machine sends some to a neighbour
    changed = args.model_copy(update={"release": str(successor.path), "teacher": False, "router": router})
    bodies = [{"prompt": prompt, "seed": seed} for prompt, seed in requests]
    served = [0, 0]

    for body, answer in load.during(url, bodies, lambda: serve.run(build(changed), name="aptp", route_prefix="/")):
        assert answer.status_code == 200, answer.text
        if answer.headers["x-aptp-reason"] == "overflow":  # the old release's target still holds on a busy machine
            continue
        pixels = pixels_of(answer.json()["data"][0]["b64_json"])
        request = (str(body["prompt"]), int(str(body["seed"])))
        matches = [int((pixels - each).abs().max()) <= 1 for each in wanted[request]]
        assert any(matches), (body, dict(answer.headers))
        served[matches.index(True)] += 1
    assert min(served) > 0, served
