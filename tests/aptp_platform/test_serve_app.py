"""A release behind real HTTP on Ray Serve, as its users meet it: the `openai` client, raw bodies, a browser."""

import base64
import contextlib
import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
import yaml
from PIL import Image
from ray.exceptions import RayActorError
from tiny_release import build_release

from aptp.pipeline import AptpPipeline
from aptp.release import BrokenReleaseError, Release
from aptp_platform.serve.app import build
from aptp_platform.serve.args import ServeArgs

STEPS, GUIDANCE = 4, 3.0
PROMPTS = ("a red cat", "a house by the sea", "blue", "an old car in front of a very tall tower")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return build_release(tmp_path_factory.mktemp("serve") / "release", num_codes=2, with_teacher=True)


@pytest.fixture(scope="module")
def args(release: Release) -> ServeArgs:
    return ServeArgs.model_validate(
        {
            "release": str(release.path),
            "teacher": True,
            "experts": {
                "num_cpus": 0.1,
                "num_threads": 1,
                "max_batch_size": 4,
                "max_waiting": 4,
                "max_queued_requests": 8,
            },
            "router": {"num_cpus": 0.1, "num_threads": 1},
            "ingress": {"num_cpus": 0.1, "body_timeout_s": 1.0},
            "images": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "sizes": ["24x16"]},
        }
    )


@pytest.fixture(scope="module")
def url(local_ray: None, args: ServeArgs) -> Iterator[str]:
    from ray import serve

    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.suppress(RayActorError, TimeoutError):  # on a starved machine Serve replaces its proxy meanwhile
        serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(args), name="aptp", route_prefix="/")
    wait_for(f"http://127.0.0.1:{port}/ready")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def wait_for(url: str, seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=10).status_code == httpx.codes.OK:
                return
        time.sleep(0.2)
    raise AssertionError(f"{url} was not ready within {seconds} s")


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def library(release: Release) -> AptpPipeline:
    return AptpPipeline.from_release(release.path)


def pixels_of(data: str | None) -> torch.Tensor:
    assert data is not None
    return pixels_of_image(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def pixels_of_image(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3).int()


def expected(library: AptpPipeline, prompt: str, seed: int, **options: Any) -> torch.Tensor:
    made = library([prompt], num_inference_steps=STEPS, guidance_scale=GUIDANCE, seeds=[seed], **options)
    return pixels_of_image(made.images[0])


def test_an_openai_client_gets_the_library_s_image_of_the_prompt_s_code(client: Any, library: AptpPipeline) -> None:
    answer = client.images.with_raw_response.generate(prompt=PROMPTS[0], model="auto", extra_body={"seed": 5})
    pixels = pixels_of(answer.parse().data[0].b64_json)
    assert (pixels - expected(library, PROMPTS[0], 5)).abs().max() <= 1
    route = library.router.route([PROMPTS[0]])
    assert answer.headers["x-aptp-code"] == f"code-{int(route.indices[0]):02d}"
    assert float(answer.headers["x-aptp-margin"]) == pytest.approx(float(route.margins[0]), abs=1e-3)
    assert answer.headers["x-aptp-reason"] == "routed"
    assert float(answer.headers["x-aptp-ms"]) > 0
    assert answer.headers["x-request-id"]


def test_a_png_says_where_it_comes_from(client: Any, release: Release) -> None:
    data = client.images.generate(prompt="a cat", model="code-01", extra_body={"seed": 9}).data[0].b64_json
    text = Image.open(io.BytesIO(base64.b64decode(data))).info
    assert (text["seed"], text["code"], text["num_inference_steps"]) == ("9", "code-01", str(STEPS))
    assert len(text["release"]) == 12


def test_many_at_once_are_each_as_if_alone(client: Any, library: AptpPipeline) -> None:
    orders = [(prompt, seed) for seed in (1, 2) for prompt in PROMPTS]

    def draw(order: tuple[str, int]) -> torch.Tensor:
        answer = client.images.generate(prompt=order[0], extra_body={"seed": order[1]})
        return pixels_of(answer.data[0].b64_json)

    with ThreadPoolExecutor(len(orders)) as threads:
        for (prompt, seed), pixels in zip(orders, threads.map(draw, orders), strict=True):
            assert (pixels - expected(library, prompt, seed)).abs().max() <= 1


def test_n_images_count_their_seeds_up(client: Any, library: AptpPipeline) -> None:
    answer = client.images.generate(prompt="a cat", n=3, extra_body={"seed": 40})
    assert [image.seed for image in answer.data] == [40, 41, 42]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (pixels_of(answer.data[2].b64_json) - expected(library, "a cat", 42)).abs().max() <= 1


def test_other_sizes_formats_and_urls(client: Any) -> None:
    answer = client.images.generate(prompt="a cat", size="24x16", output_format="webp", response_format="url")
    head, _, data = answer.data[0].url.partition(",")
    assert head == "data:image/webp;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.size, image.format) == ((24, 16), "WEBP")


def test_the_teacher_is_a_model_too(client: Any, library: AptpPipeline) -> None:
    answer = client.images.with_raw_response.generate(prompt="a cat", model="teacher", extra_body={"seed": 3})
    assert answer.headers["x-aptp-macs-ratio"] == "1.0000"
    pixels = pixels_of(answer.parse().data[0].b64_json)
    assert (pixels - expected(library, "a cat", 3, use_teacher=True)).abs().max() <= 1


def test_a_stream_brings_partial_images_and_then_the_image(client: Any, library: AptpPipeline) -> None:
    stream = client.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body={"seed": 6})
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert (pixels_of(events[-1].b64_json) - expected(library, "a cat", 6)).abs().max() <= 1


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["auto", "code-00", "code-01", "teacher"]
    assert client.models.retrieve("code-00").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


def test_a_route_is_told_without_an_image(http: httpx.Client, library: AptpPipeline, release: Release) -> None:
    answer = http.post("/v1/route", json={"prompt": PROMPTS[1]}).json()
    route = library.router.route([PROMPTS[1]])
    index = int(route.indices[0])
    assert (answer["model"], answer["reason"]) == (f"code-{index:02d}", "routed")
    assert answer["similarities"] == pytest.approx(route.similarities[0].tolist(), abs=1e-3)
    assert answer["ratio"] == release.codes[index].ratio
    assert answer["macs"] == release.codes[index].macs


def test_a_budget_picks_the_largest_that_fits(http: httpx.Client, release: Release) -> None:
    ratios = [code.ratio for code in release.codes]
    for budget in (min(ratios), max(ratios), 1.0):
        answer = http.post("/v1/route", json={"prompt": "a cat", "budget": budget}).json()
        assert answer["ratio"] == max(ratio for ratio in [*ratios, 1.0] if ratio <= budget)
    refused = http.post("/v1/route", json={"prompt": "a cat", "budget": min(ratios) / 2})
    assert refused.status_code == 422
    assert refused.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"prompt": "a cat", "model": "dall-e-3"}, openai.NotFoundError),
        ({"prompt": ""}, openai.BadRequestError),
        ({"prompt": "a cat", "n": 1000}, openai.BadRequestError),
        ({"prompt": "a cat", "size": "1000000x1000000"}, openai.BadRequestError),
        ({"prompt": "a cat", "extra_body": {"budget": 0.001}}, openai.UnprocessableEntityError),
        ({"prompt": "a cat", "stream": True, "extra_body": {"budget": 0.001}}, openai.UnprocessableEntityError),
    ],
)
def test_faults_are_the_client_s_own_exceptions(client: Any, kwargs: Any, kind: type[openai.APIStatusError]) -> None:
    with pytest.raises(kind) as caught:
        client.images.generate(**kwargs)
    assert caught.value.request_id
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}


def test_a_hostile_set_gets_its_4xx_and_the_server_goes_on(http: httpx.Client, url: str) -> None:
    path, kind = "/v1/images/generations", {"content-type": "application/json"}
    for body, status in (
        (b'{"prompt": "' + b"a" * 1_000_000 + b'"}', 413),
        (b'{"prompt": "a\\u0000b"}', 400),
        (b'{"prompt": "a cat", "guidance_scale": NaN}', 400),
        (b"\xff\xfe", 400),
        (b"", 400),
    ):
        answer = http.post(path, content=body, headers=kind)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
    assert http.post(path, content=b"prompt=a").status_code == 415
    assert http.get(path).status_code == 405
    assert http.get("/v1/images").json()["error"]["code"] == "unknown_url"
    with closing(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)) as slow:
        slow.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode())
        slow.sendall(b'content-length: 100\r\n\r\n{"prompt": ')
        assert b" 408 " in slow.recv(4096).partition(b"\r\n")[0]
    assert http.post(path, json={"prompt": "🧀 Käse \u202e"}).status_code == 200


def test_an_overflowing_queue_is_a_429_that_says_when(http: httpx.Client, url: str) -> None:
    body = {"prompt": "a cat", "model": "code-00", "num_inference_steps": 60}

    def draw(_: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(draw, range(40)))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert http.get("/ready").json()["models"]["code-00"]["running"] == 0


def test_the_page_and_the_probes(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    ready = http.get("/ready").json()
    assert (ready["status"], ready["size"], set(ready["models"])) == (
        "ready",
        "16x16",
        {"code-00", "code-01", "teacher"},
    )
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text.replace("http://www.w3.org", ""), "the page needs no other host"


@pytest.mark.parametrize(
    ("change", "named"),
    [({"codes": {5: {}}}, "codes: 5"), ({"release": "/nowhere/at/all"}, "holds no release.json")],
)
def test_a_config_that_does_not_fit_the_release_is_refused(args: ServeArgs, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(ServeArgs.model_validate({**args.model_dump(), **change}))


def test_a_release_that_was_touched_is_refused(tmp_path: Path, args: ServeArgs) -> None:
    broken = build_release(tmp_path / "release", num_codes=1, with_teacher=False)
    with pytest.raises(ValueError, match="without its teacher"):
        build(args.model_copy(update={"release": str(broken.path), "codes": {}}))
    router = broken.router_path / "router.json"
    router.write_text(router.read_text() + " ")
    with pytest.raises(BrokenReleaseError, match=r"router\.json"):
        build(args.model_copy(update={"release": str(broken.path), "teacher": False}))


@pytest.mark.parametrize("name", ["demo", "experts"])
def test_the_shipped_configs_are_valid(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((Path(__file__).parents[2] / "serve_configs" / f"{name}.yaml").read_text())
    application = ServeDeploySchema.model_validate(config).applications[0]
    assert application.import_path == "aptp_platform.serve.app:build"
    ServeArgs.model_validate(json.loads(json.dumps(application.args)))


def replica(name: str) -> psutil.Process:
    """The process of a deployment's only replica, among this very session's."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[0].startswith(f"ray::ServeReplica:aptp:{name}"):
                return process
    raise AssertionError(f"no process of {name}")


@pytest.mark.parametrize("name", ["Expert-00", "Router"])
def test_a_replica_that_is_killed_under_load_costs_nobody_an_image(
    url: str, http: httpx.Client, library: AptpPipeline, name: str
) -> None:
    body = {"prompt": PROMPTS[0], "model": "code-00", "num_inference_steps": 60}
    wanted = library([PROMPTS[0]] * 2, num_inference_steps=60, guidance_scale=GUIDANCE, seeds=[0, 1]).images

    def draw(seed: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/images/generations", json={**body, "seed": seed}, timeout=300)

    with ThreadPoolExecutor(6) as threads:
        answers = [(seed, threads.submit(draw, seed)) for seed in (0, 1) * 3]
        while http.get("/ready").json()["models"]["code-00"]["running"] < len(answers):
            time.sleep(0.02)
        replica(name).kill()
        for seed, answer in answers:
            assert answer.result().status_code == 200, answer.result().text
            pixels = pixels_of(answer.result().json()["data"][0]["b64_json"])
            assert (pixels - pixels_of_image(wanted[seed])).abs().max() <= 1


def test_those_who_hang_up_leave_no_work_behind(url: str, http: httpx.Client) -> None:
    body = {"prompt": "a cat", "model": "code-01", "num_inference_steps": 99}

    def hang_up(streamed: bool) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{url}/v1/images/generations", json={**body, "stream": streamed}, timeout=1.0)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(hang_up, [False, True] * 6))
    started = time.monotonic()
    while http.get("/ready").json()["models"]["code-01"]["running"] and time.monotonic() - started < 5:
        time.sleep(0.05)
    assert http.get("/ready").json()["models"]["code-01"]["running"] == 0
    assert http.post("/v1/images/generations", json={**body, "num_inference_steps": 2}).status_code == 200


def test_the_client_s_own_retries_bring_a_refused_order_through(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=120) as patient:

        def draw(_: int) -> int:
            answer = patient.images.generate(prompt="a cat", model="code-00", extra_body={"num_inference_steps": 20})
            return len(answer.data or ())

        with ThreadPoolExecutor(24) as threads:
            assert sum(threads.map(draw, range(24))) == 24
