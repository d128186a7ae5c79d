"""What HTTP clients and browsers expect besides the wire format: paths, methods, other origins, URLs of images."""

import asyncio
import io
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aptp_platform.serve.messages import Choice, GenerationRequest, SourceImage
from tests.support.cheap_server import CheapGateway, answers

GENERATE = "/v1/images/generations"


def test_a_slash_at_the_end_and_other_methods_are_answered_and_nothing_redirects() -> None:
    get, post, head, options, schema, wrong = answers(
        {"url": "/v1/models/"},
        {"url": f"{GENERATE}/", "method": "POST", "json": {"prompt": "a"}, "headers": {"host": "evil.example"}},
        {"url": "/health", "method": "HEAD"},
        {"url": GENERATE, "method": "OPTIONS"},
        {"url": "/openapi.json"},
        {"url": GENERATE, "method": "DELETE"},
    )
    assert (get.status_code, post.status_code) == (200, 200)
    assert (head.status_code, head.content) == (200, b"")
    assert (options.status_code, options.headers["allow"]) == (204, "POST, OPTIONS")
    assert schema.status_code == 404
    assert wrong.status_code == 405


def test_a_page_of_another_origin_may_call_only_if_the_config_names_it() -> None:
    asked = {
        "url": GENERATE,
        "method": "OPTIONS",
        "headers": {
            "origin": "https://ui.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        },
    }
    call = {"url": "/v1/models", "headers": {"origin": "https://ui.example"}}
    for origins, wanted in (
        ([], None),
        (["https://other.example"], None),
        (["https://ui.example"], "https://ui.example"),
        (["*"], "*"),
    ):
        preflight, answer = answers(asked, call, ingress={"cors_origins": origins})
        assert answer.headers.get("access-control-allow-origin") == wanted
        assert preflight.headers.get("access-control-allow-origin") == wanted
        assert (preflight.status_code == 200) == (wanted is not None)
        if wanted is not None:
            assert "x-aptp-code" in answer.headers["access-control-expose-headers"]
            assert "authorization" in preflight.headers["access-control-allow-headers"]


def test_a_url_can_be_fetched_until_it_expires_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"url": GENERATE, "method": "POST", "json": {"prompt": "a", "response_format": "url"}}
    links = {"folder": str(tmp_path), "expires_s": 60, "base_url": "https://images.example/"}
    (answer,) = answers(asked, links=links)
    url = answer.json()["data"][0]["url"]
    assert url.startswith("https://images.example/v1/images/files/")
    path = url.removeprefix("https://images.example")
    file, head, guess, outside = answers(
        {"url": path},
        {"url": path, "method": "HEAD"},
        {"url": path[:-10] + "a" * 6 + ".png"},
        {"url": "/v1/images/files/..%2F..%2Fetc%2Fpasswd"},
        links=links,
    )
    assert (file.content, file.headers["content-type"]) == (b"image", "image/png")
    assert (head.status_code, head.content) == (200, b"")
    assert (guess.status_code, outside.status_code) == (404, 404)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    (late,) = answers({"url": path}, links=links)
    assert (late.status_code, late.json()["error"]["code"]) == (404, "image_not_found")
    monkeypatch.setattr("aptp_platform.serve.http.links._SWEEP_S", -1.0)
    answers(asked, links=links)
    assert path.rpartition("/")[2] not in {file.name for file in tmp_path.iterdir()}, "an expired file is removed"


def test_a_url_is_of_the_server_as_the_client_reached_it_or_a_data_url_where_replicas_share_no_folder() -> None:
    asked: dict[str, Any] = {
        "url": GENERATE,
        "method": "POST",
        "json": {"prompt": "a", "response_format": "url"},
        "headers": {"host": "img.example:8443", "x-forwarded-proto": "https"},
    }
    (answer,) = answers(asked)
    assert answer.json()["data"][0]["url"].startswith("https://img.example:8443/v1/images/files/")
    (answer,) = answers(asked, ingress={"scaling": {"max_replicas": 2}})
    assert answer.json()["data"][0]["url"] == "data:image/png;base64,aW1hZ2U="


def test_the_answer_says_what_was_made_of_the_request() -> None:
    body = {"prompt": "a", "model": "dall-e-3", "size": "1024x1024", "quality": "hd", "user": "u"}
    (answer,) = answers({"url": GENERATE, "method": "POST", "json": body})
    assert answer.json()["size"] == "16x16"
    assert answer.headers["x-aptp-size"] == "16x16, nearest to 1024x1024"
    assert answer.headers["x-aptp-ignored"] == "quality"


def picture(size: tuple[int, int], mode: str = "RGB", colour: Any = "red") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, "png")
    return stream.getvalue()


class Noting(CheapGateway):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[GenerationRequest] = []

    async def route(self, request: GenerationRequest) -> Choice:
        self.asked.append(request)
        return await super().route(request)


def test_an_edit_comes_as_a_form_with_pictures_which_are_cut_to_a_served_size() -> None:
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    stream = io.BytesIO()
    half.save(stream, "png")
    gateway = Noting()
    edit = {"url": "/v1/images/edits", "method": "POST"}
    fields = {"prompt": "a", "model": "gpt-image-1", "n": "2", "input_fidelity": "high", "num_inference_steps": "10"}
    whole, masked, wide, own, varied = answers(
        edit | {"data": fields, "files": {"image[]": ("a.png", picture((64, 64)))}},
        edit | {"data": fields, "files": {"image": ("a.png", picture((64, 64))), "mask": ("m.png", stream.getvalue())}},
        edit | {"data": fields, "files": {"image": ("a.webp", picture((48, 32)))}},
        edit | {"data": fields, "files": {"image": ("a.png", stream.getvalue())}},
        {"url": "/v1/images/variations", "method": "POST", "files": {"image": ("a.png", picture((64, 64)))}},
        gateway=gateway,
        images={"sizes": ["24x16"]},
    )
    assert [each.status_code for each in (whole, masked, wide, own, varied)] == [200] * 5, whole.text
    assert len(whole.json()["data"]) == 2
    assert whole.headers["x-aptp-ignored"] == "input_fidelity"
    assert wide.headers["x-aptp-size"] == "24x16", "the served size of the picture's shape"
    sources = [request.source for request in gateway.asked]
    assert [source and source.strength for source in sources] == [0.8, 1.0, 0.8, 1.0, 0.6]
    assert [request.steps for request in gateway.asked[:2]] == [8, 10]
    first, second, _, fourth, _ = sources
    assert first == SourceImage(b"\xff\0\0" * 256, None, 0.8)
    assert second is not None
    assert second.mask == (b"\xff" * 8 + b"\0" * 8) * 16, "what is transparent is drawn anew"
    assert fourth is not None
    assert fourth.mask == second.mask, "of the picture itself, if there is no mask"


@pytest.mark.parametrize(
    ("call", "status", "code"),
    [
        ({"json": {"prompt": "a"}}, 415, "unsupported_media_type"),
        ({"data": {"prompt": "a"}, "files": {"other": ("a.png", b"x")}}, 400, "missing_required_parameter"),
        ({"data": {"prompt": "a"}, "files": {"image": ("a.png", b"x")}}, 400, "invalid_image"),
        ({"data": {"prompt": "a"}, "files": {"image": ("a.png", picture((64, 64))[:60])}}, 400, "invalid_image"),
        ({"data": {"prompt": "a"}, "files": {"image": ("a.png", picture((9000, 9000), "1", 0))}}, 400, "invalid_image"),
        ({"data": {"prompt": "a", "n": "x"}, "files": {"image": ("a.png", picture((8, 8)))}}, 400, None),
        ({"data": {"prompt": "a", "strength": "2"}, "files": {"image": ("a", picture((8, 8)))}}, 400, "invalid_value"),
        ({"data": {}, "files": {"image": ("a.png", picture((8, 8)))}}, 400, "missing_required_parameter"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "invalid_form"),
        ({"content": b"--b\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "invalid_form"),
        (
            {"content": b"x" * 2000, "headers": {"content-type": "multipart/form-data; boundary=b"}},
            413,
            "request_too_large",
        ),
    ],
)
def test_a_wrong_edit_gets_its_own_answer(call: dict[str, Any], status: int, code: str | None) -> None:
    limits = {"max_upload_bytes": 1024} if status == 413 else {}
    (answer,) = answers({"url": "/v1/images/edits", "method": "POST", **call}, ingress=limits)
    assert answer.status_code == status, answer.text
    assert code in (None, answer.json()["error"]["code"]), answer.text


class SlowGateway(CheapGateway):
    """Takes its time for everything."""

    async def route(self, request: GenerationRequest) -> Choice:
        await asyncio.sleep(5)
        return await super().route(request)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_is_a_504_at_the_deadline(stream: bool) -> None:
    started = time.monotonic()
    body = {"prompt": "a", "deadline_ms": 200, "stream": stream}
    (answer,) = answers({"url": GENERATE, "method": "POST", "json": body}, gateway=SlowGateway())
    assert time.monotonic() - started < 2
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("deadline_exceeded", "deadline_ms")
