"""A release behind real HTTP on Ray Serve, as its users meet it: the `openai` client, raw bodies, a browser."""

import base64
import io
import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import torch
import yaml
from PIL import Image

from aptp.pipeline import AptpPipeline
from aptp.release import BrokenReleaseError, Release
from aptp_platform.serve.app import build
from aptp_platform.serve.args import ServeArgs
from aptp_platform.serve.release_source import ReleaseSource
from aptp_platform.serve.routing.replay import replay
from tests.support import load
from tests.support.chromium import CHROMIUM, chromium
from tests.support.client_requests import CLIENT_REQUESTS
from tests.support.served import (
    PROMPTS,
    STEPS,
    args,
    client,
    expected,
    http,
    library,
    pixels_of,
    release,
    url,
)
from tests.support.tiny_release import build_release

__all__ = ["args", "client", "http", "library", "release", "url"]  # fixtures


def test_an_openai_client_gets_the_library_s_image_of_the_prompt_s_code(client: Any, library: AptpPipeline) -> None:
    answer = client.images.with_raw_response.generate(prompt=PROMPTS[0], model="auto", extra_body={"seed": 5})
    pixels = pixels_of(answer.parse().data[0].b64_json)
    assert (pixels - expected(library, PROMPTS[0], 5)).abs().max() <= 1
    route = library.router.route([PROMPTS[0]])
    assert answer.headers["x-aptp-code"] == f"code-{int(route.indices[0]):02d}"
    assert route.losses is not None
    assert float(answer.headers["x-aptp-margin"]) == pytest.approx(float(route.margins[0]), rel=1e-2)
    assert float(answer.headers["x-aptp-predicted-loss"]) == pytest.approx(
        float(route.losses[0, route.indices[0]]), rel=1e-2
    )
    assert answer.headers["x-aptp-reason"] == "routed"
    assert float(answer.headers["x-aptp-ms"]) > 0
    assert answer.headers["x-request-id"]


def test_a_png_says_where_it_comes_from(client: Any, release: Release) -> None:
    data = client.images.generate(prompt="a cat", model="code-01", extra_body={"seed": 9}).data[0].b64_json
    text = Image.open(io.BytesIO(base64.b64decode(data))).info
    assert (text["seed"], text["code"], text["num_inference_steps"]) == ("9", "code-01", str(STEPS))
    assert len(text["release"]) == 12


def test_many_at_once_are_each_as_if_alone(client: Any, library: AptpPipeline) -> None:
    requests = [(prompt, seed) for seed in (1, 2) for prompt in PROMPTS]

    def draw(request: tuple[str, int]) -> torch.Tensor:
        answer = client.images.generate(prompt=request[0], extra_body={"seed": request[1]})
        return pixels_of(answer.data[0].b64_json)

    with ThreadPoolExecutor(len(requests)) as threads:
        for (prompt, seed), pixels in zip(requests, threads.map(draw, requests), strict=True):
            assert (pixels - expected(library, prompt, seed)).abs().max() <= 1


def test_n_images_count_their_seeds_up(client: Any, library: AptpPipeline) -> None:
    answer = client.images.generate(prompt="a cat", n=3, extra_body={"seed": 40})
    assert [image.seed for image in answer.data] == [40, 41, 42]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (pixels_of(answer.data[2].b64_json) - expected(library, "a cat", 42)).abs().max() <= 1


def test_other_sizes_formats_and_urls(client: Any) -> None:
    answer = client.images.generate(prompt="a cat", size="24x16", output_format="webp", response_format="url")
    file = httpx.get(answer.data[0].url)  # without a key, as a browser's img
    assert file.headers["content-type"] == "image/webp"
    image = Image.open(io.BytesIO(file.content))
    assert (image.size, image.format) == ((24, 16), "WEBP")


@pytest.mark.parametrize("name", CLIENT_REQUESTS)
def test_a_popular_client_s_default_request_is_served_and_its_picture_is_where_it_looks(
    http: httpx.Client, name: str
) -> None:
    body, place = CLIENT_REQUESTS[name]
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    (entry,) = answer.json()["data"]
    data = base64.b64decode(entry["b64_json"]) if place == "b64_json" else httpx.get(entry["url"]).content
    assert set(entry) == {place, "seed"}
    assert Image.open(io.BytesIO(data)).format == body.get("output_format", "png").upper()


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


def test_an_openai_client_s_edit_keeps_what_the_mask_does_not_open(client: Any) -> None:
    source = client.images.generate(prompt="a cat", extra_body={"seed": 6}).data[0].b64_json
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    stream = io.BytesIO()
    for picture in (mask,):
        picture.paste((0, 0, 0, 0), (8, 0, 16, 16))
        picture.save(stream, "png")
    files = {"image": ("a.png", base64.b64decode(source)), "mask": ("m.png", stream.getvalue())}
    same, other = (
        pixels_of(client.images.edit(prompt="a house", extra_body={"seed": seed}, **files).data[0].b64_json)
        for seed in (1, 2)
    )
    apart = (same - other).abs().float().mean((0, 2))
    assert apart[:6].mean() < apart[10:].mean() / 2, apart
    varied = client.images.create_variation(image=files["image"], n=2, response_format="b64_json")
    assert [pixels_of(each.b64_json).shape for each in varied.data] == [(16, 16, 3)] * 2
    stream_events = list(client.images.edit(prompt="a house", stream=True, partial_images=1, image=files["image"]))
    assert [event.type for event in stream_events] == ["image_edit.partial_image", "image_edit.completed"]


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["auto", "code-00", "code-01", "teacher"]
    assert client.models.retrieve("code-00").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


def test_a_route_should_log_without_an_image(http: httpx.Client, library: AptpPipeline, release: Release) -> None:
    answer = http.post("/v1/route", json={"prompt": PROMPTS[1]}).json()
    route = library.router.route([PROMPTS[1]])
    index = int(route.indices[0])
    assert (answer["model"], answer["reason"]) == (f"code-{index:02d}", "routed")
    assert (answer["routing"], answer["price"]) == ("need", pytest.approx(float(library.router.price)))
    assert route.losses is not None
    losses = [*route.losses[0].tolist(), 0.0]
    assert [model["predicted_loss"] for model in answer["models"]] == pytest.approx(losses, rel=1e-3)
    assert [model["ratio"] for model in answer["models"]] == [*(code.ratio for code in release.codes), 1.0]
    assert answer["predicted_loss"] == answer["models"][index]["predicted_loss"]
    assert answer["similarities"] == pytest.approx(route.similarities[0].tolist(), abs=1e-3)
    assert answer["ratio"] == release.codes[index].ratio
    assert answer["macs"] == release.codes[index].macs


def test_a_budget_and_a_price_pick_by_predicted_loss(http: httpx.Client, release: Release) -> None:
    ratios = [code.ratio for code in release.codes]
    for budget in (min(ratios), max(ratios), 1.0):
        answer = http.post("/v1/route", json={"prompt": "a cat", "budget": budget}).json()
        fitting = [model["predicted_loss"] for model in answer["models"] if model["ratio"] <= budget]
        assert (answer["predicted_loss"], answer["reason"]) == (min(fitting), "budget")
    best, cheapest = (http.post("/v1/route", json={"prompt": "a cat", "price": price}).json() for price in (0, 1e9))
    assert best["predicted_loss"] == min(model["predicted_loss"] for model in best["models"][:-1])
    assert (cheapest["ratio"], cheapest["reason"]) == (min(ratios), "price")
    assert best["model"] != cheapest["model"]
    refused = http.post("/v1/route", json={"prompt": "a cat", "budget": min(ratios) / 2})
    assert refused.status_code == 422
    assert refused.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"prompt": "a cat", "model": "dall-e"}, openai.NotFoundError),
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
    with closing(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)) as endless:
        endless.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 66_000)
        assert b" 431 " in endless.recv(4096).partition(b"\r\n")[0]
    assert http.post(path, json={"prompt": "🧀 Käse \u202e"}).status_code == 200


def test_decisions_are_logged_and_can_be_replayed(client: Any, args: ServeArgs, release: Release) -> None:
    answer = client.images.with_raw_response.generate(prompt="a prompt of its own", n=2)
    folder = Path(args.decisions.folder or "")
    lines = [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
    (line,) = (each for each in lines if each["prompt"] == "a prompt of its own")
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["model"], line["images"], line["outcome"]) == (answer.headers["x-aptp-code"], 2, "ok")
    assert set(line["predicted_loss"]) == {"code-00", "code-01", "teacher"}
    assert line["predicted_loss"][line["model"]] == pytest.approx(
        float(answer.headers["x-aptp-predicted-loss"]), rel=1e-3
    )
    told = replay([folder], ReleaseSource(str(release.path)))
    assert (told.replayed, told.changed, told.broken) == (len(lines), 0, 0)


def test_metrics_are_exported(http: httpx.Client) -> None:
    (node,) = ray.nodes()
    port = node["MetricsExportPort"]
    wanted = {
        "aptp_requests_total", "aptp_request_latency_seconds", "aptp_route_drift", "aptp_unknown_prompt_rate",
        "aptp_macs_total", "aptp_batch_size", "aptp_batch_limit", "aptp_refused_total",
    }  # fmt: skip

    def missing() -> set[str]:
        for prompt in ("a cat", ""):  # one that is served, one that is refused
            http.post("/v1/images/generations", json={"prompt": prompt})
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        return {name for name in wanted if f"ray_{name}" not in text}

    assert load.settles(lambda: not missing(), 30), missing()


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


def test_the_snippets_of_the_readme_run_as_they_stand(
    url: str, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (shell,) = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    ran = subprocess.run(["bash", "-euo", "pipefail", "-c", shell], capture_output=True, text=True, check=True)
    assert Image.open(tmp_path / "apple.png").size == (16, 16)
    assert json.loads(ran.stdout)["reason"] == "routed"
    (python,) = (each for each in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "import openai" in each)
    exec(compile(python, "README.md", "exec"), {})
    code, reason, ratio = capsys.readouterr().out.split()
    assert reason == "budget"
    assert float(ratio) == pytest.approx(release.codes[int(code.removeprefix("code-"))].ratio, abs=1e-4)
    assert float(ratio) <= 0.7


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; Debian's package of that name has it")
def test_the_page_in_a_browser(url: str, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as page:
        page.open(f"{url}/?prompt=a+red+cat")
        finished = "[...document.querySelectorAll('figure img')].filter(image => image.src && !image.hidden"
        page.wait(f"{finished} && !image.classList.contains('partial')).length === 2")
        captions = page.evaluate("[...document.querySelectorAll('figcaption b')].map(each => each.textContent)")
        assert captions[0] in ("code-00", "code-01")
        assert captions[1] == "full model"
        page.wait(
            "document.querySelectorAll('#map .code').length === 2 && document.querySelector('#map .now') !== null"
        )
        page.wait("document.querySelectorAll('#map .prompt').length === 10")
        assert page.evaluate("document.querySelector('.row.chosen button').textContent") == captions[0]
        lost = page.evaluate("[...document.querySelectorAll('figure .loss')].map(row => row.textContent)")
        assert [each.split()[0] for each in lost] == ["code-00", "code-01", "full"]
        assert page.evaluate("document.querySelector('figure .loss.chosen').textContent").startswith(captions[0])
        page.evaluate("document.querySelectorAll('#codes .row:not(.head) button')[1].click()")
        assert page.evaluate("document.getElementById('budgetText').textContent") == "code-01"
        page.evaluate("document.getElementById('prompt').value = 'a red cat\\u0001'")
        page.evaluate("document.getElementById('form').requestSubmit()")
        page.wait("document.getElementById('error').textContent.includes('control characters')")
        assert {request.split("?")[0] for request in page.requests if not request.startswith(("data:", url))} == set()
        assert [each for each in page.errors if "400" not in each] == []
        page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50, "a image of something"


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

    config = yaml.safe_load((Path(__file__).parents[3] / "serve_configs" / f"{name}.yaml").read_text())
    application = ServeDeploySchema.model_validate(config).applications[0]
    assert application.import_path == "aptp_platform.serve.app:build"
    ServeArgs.model_validate(json.loads(json.dumps(application.args)))
