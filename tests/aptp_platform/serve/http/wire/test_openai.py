"""The wire format: legal bodies become requests; each illegal one gets its status, code and parameter."""

import json
from dataclasses import replace
from typing import Any

import pytest

from aptp_platform.serve.args import ImageArgs
from aptp_platform.serve.http.wire.fields import ImageRequest, RouteRequest, parse_body
from aptp_platform.serve.http.wire.openai import adaptations, choice_json, error_body, to_generation_request
from aptp_platform.serve.http.wire.substitutes import check_names, model_of, size_of
from aptp_platform.serve.messages import (
    TEACHER,
    ApiError,
    Catalog,
    Choice,
    GenerationRequest,
    ModelFacts,
    Prediction,
    code_name,
)

CATALOG = Catalog(
    "0123456789ab",
    (64, 64),
    (
        ModelFacts(code_name(0), 0.5, 5e8, 10, 0.4),
        ModelFacts(code_name(1), 0.75, 7.5e8, 15, 0.6),
        ModelFacts(TEACHER, 1.0, 1e9, None, None),
    ),
)
LIMITS = ImageArgs(sizes=("64x96",), max_images=4, max_prompt_chars=100)


STRICT = LIMITS.model_copy(update={"other_sizes": "refuse"})


def request(body: Any, limits: ImageArgs = STRICT) -> GenerationRequest:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return to_generation_request(parse_body(ImageRequest, data)[0], limits, CATALOG)


def refusal(body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        request(body)
    return caught.value


def test_a_prompt_is_enough() -> None:
    made = request({"prompt": "a cat"})
    assert (made.model, made.size, made.num_inference_steps, made.guidance_scale) == ("auto", (64, 64), 25, 7.5)
    assert len(made.seeds) == 1
    assert request({"prompt": "a cat"}).seeds != made.seeds, "seeds are drawn"


def test_everything_openai_and_we_know_is_understood() -> None:
    made = request(
        {
            "prompt": "ein Käse 🧀\n\twith 'quotes'",
            "model": "code-01",
            "n": 3,
            "size": "64x96",
            "response_format": "b64_json",
            "output_format": "webp",
            "output_compression": 70,
            "background": "opaque",
            "quality": "hd",
            "style": "natural",
            "moderation": "low",
            "user": "somebody",
            "seed": 4294967295,
            "negative_prompt": "fog",
            "num_inference_steps": 4,
            "guidance_scale": 0,
            "budget": 0.9,
            "deadline_ms": 2000,
            "price": 0,
        }
    )
    assert made.seeds == (4294967295, 0, 1), "seeds count up, and around"
    assert (made.size, made.output_format, made.compression) == ((64, 96), "webp", 70)
    assert (made.budget, made.deadline_ms, made.price) == (0.9, 2000, 0)
    assert (made.guidance_scale, made.negative_prompt) == (0, "fog")


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ("dall-e-3", "auto"),
        ("gpt-image-2.5-flare", "auto"),
        ("openai/dall-e-2", "auto"),
        ("openai/auto", "auto"),
        ("aptp/code-01", "code-01"),
        ("best", "teacher"),
        ("some/best", "teacher"),
        ("org/named", "code-00"),
    ],
)
def test_a_model_goes_by_its_name_an_alias_or_either_behind_a_provider(asked: str, model: str) -> None:
    limits = LIMITS.model_copy(update={"aliases": {**LIMITS.aliases, "best": "teacher", "org/na*": "code-00"}})
    assert model_of(asked, limits, CATALOG) == model


def test_any_other_name_is_refused_unless_the_config_gives_it_a_meaning() -> None:
    with pytest.raises(ApiError, match="auto, code-00, code-01, teacher"):
        model_of("code-99", LIMITS, CATALOG)
    lenient = LIMITS.model_copy(update={"other_models": "code-01"})
    assert model_of("code-99", lenient, CATALOG) == "code-01"
    check_names(lenient, CATALOG)
    for wrong in ({"aliases": {"x": "code-02"}}, {"other_models": "code-02"}):
        with pytest.raises(ValueError, match=r"images\..*'code-02' is no model of this release"):
            check_names(LIMITS.model_copy(update=wrong), CATALOG)


@pytest.mark.parametrize(
    ("policy", "asked", "drawn", "file", "told"),
    [
        ("nearest", "auto", (64, 64), None, "64x64"),
        ("nearest", "64x96", (64, 96), None, "64x96"),
        ("nearest", "1024x1024", (64, 64), None, "64x64, nearest to 1024x1024"),
        ("nearest", "1024x1792", (64, 96), None, "64x96, nearest to 1024x1792"),
        ("nearest", "1x99999", (64, 96), None, "64x96, nearest to 1x99999"),
        ("resize", "1024x1024", (64, 64), (1024, 1024), "64x64, resized to 1024x1024"),
        ("resize", "64x64", (64, 64), None, "64x64"),
    ],
)
def test_a_size_that_is_not_served_is_drawn_as_the_nearest(
    policy: str, asked: str, drawn: tuple[int, int], file: tuple[int, int] | None, told: str
) -> None:
    size = size_of(asked, LIMITS.model_copy(update={"other_sizes": policy}), CATALOG.size)
    assert (size.drawn, size.resized, size.told) == (drawn, file, told)


def test_a_resized_image_has_a_largest_side() -> None:
    with pytest.raises(ApiError, match="at most 4096 pixels"):
        size_of("4097x64", LIMITS.model_copy(update={"other_sizes": "resize"}), CATALOG.size)


def test_what_has_no_effect_is_taken_and_told() -> None:
    data = {"prompt": "a", "quality": "hd", "style": "vivid", "background": "transparent", "moderation": "auto",
            "complexity": "low", "metadata": {"chat": 1}, "user": "u", "mode": "x", "\r\nset-cookie": 1}  # fmt: skip
    with pytest.raises(ApiError, match=r"Unknown parameter: 'mode'.*'model'"):
        parse_body(ImageRequest, json.dumps(data).encode())
    body, unknown = parse_body(ImageRequest, json.dumps(data).encode(), ignore_unknown=True)
    assert adaptations(body, unknown, LIMITS, CATALOG) == {
        "x-aptp-size": "64x64",
        "x-aptp-ignored": "quality, style, complexity, background, mode",
    }, "no line breaks of a stranger in a header"


def test_fields_go_by_the_names_of_other_servers_too() -> None:
    made = request({"prompt": "a", "steps": 4, "cfg": 2.5, "width": 64, "height": 96, "seed": -1})
    assert (made.num_inference_steps, made.guidance_scale, made.size) == (4, 2.5, (64, 96))
    assert made.seeds != request({"prompt": "a", "seed": -1}).seeds, "-1 is a drawn seed"


def test_null_means_absent() -> None:
    assert request({"prompt": "a cat", "n": None, "size": None, "seed": None, "model": None}).size == (64, 64)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b'{"prompt": "\\ud800"}', 400, "invalid_json", None),
        (b'{"prompt": "\xff"}', 400, "invalid_json", None),
        (b"[" * 100_000, 400, "invalid_json", None),
        (b"[]", 400, "invalid_type", None),
        (b'"a cat"', 400, "invalid_type", None),
        ({}, 400, "missing_required_parameter", "prompt"),
        ({"prompt": None}, 400, "invalid_type", "prompt"),
        ({"prompt": ["a cat"]}, 400, "invalid_type", "prompt"),
        ({"prompt": "  \n"}, 400, "invalid_value", "prompt"),
        ({"prompt": "a\x00cat"}, 400, "invalid_value", "prompt"),
        ({"prompt": "a" * 101}, 400, "invalid_value", "prompt"),
        ({"prompt": "a", "negative_prompt": "a" * 101}, 400, "invalid_value", "negative_prompt"),
        ({"prompt": "a", "negative_prompt": "\x1b[2J"}, 400, "invalid_value", "negative_prompt"),
        ({"prompt": "a", "n": 0}, 400, "invalid_value", "n"),
        ({"prompt": "a", "n": 1000}, 400, "invalid_value", "n"),
        ({"prompt": "a", "n": "2"}, 400, "invalid_type", "n"),
        ({"prompt": "a", "n": True}, 400, "invalid_type", "n"),
        ({"prompt": "a", "n": 1.5}, 400, "invalid_type", "n"),
        ({"prompt": "a", "n": 10**400}, 400, None, "n"),
        ({"prompt": "a", "size": "1000000x1000000"}, 400, "invalid_value", "size"),
        ({"prompt": "a", "size": "64"}, 400, "invalid_value", "size"),
        ({"prompt": "a", "size": "512x512"}, 400, "invalid_value", "size"),
        ({"prompt": "a", "size": "x" * 10_000}, 400, "invalid_value", "size"),
        ({"prompt": "a", "guidance_scale": float("nan")}, 400, "invalid_value", "guidance_scale"),
        ({"prompt": "a", "guidance_scale": float("inf")}, 400, "invalid_value", "guidance_scale"),
        ({"prompt": "a", "guidance_scale": -1}, 400, "invalid_value", "guidance_scale"),
        ({"prompt": "a", "guidance_scale": 1000}, 400, "invalid_value", "guidance_scale"),
        ({"prompt": "a", "num_inference_steps": 0}, 400, "invalid_value", "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": 101}, 400, "invalid_value", "num_inference_steps"),
        ({"prompt": "a", "seed": -2}, 400, "invalid_value", "seed"),
        ({"prompt": "a", "seed": 2**32}, 400, "invalid_value", "seed"),
        ({"prompt": "a", "budget": 0}, 400, "invalid_value", "budget"),
        ({"prompt": "a", "budget": 1.5}, 400, "invalid_value", "budget"),
        ({"prompt": "a", "deadline_ms": float("nan")}, 400, "invalid_value", "deadline_ms"),
        ({"prompt": "a", "price": -0.1}, 400, "invalid_value", "price"),
        ({"prompt": "a", "price": float("inf")}, 400, "invalid_value", "price"),
        ({"prompt": "a", "price": "cheapest"}, 400, "invalid_type", "price"),
        ({"prompt": "a", "output_format": "gif"}, 400, "invalid_value", "output_format"),
        ({"prompt": "a", "output_compression": 101}, 400, "invalid_value", "output_compression"),
        ({"prompt": "a", "response_format": "path"}, 400, "invalid_value", "response_format"),
        ({"prompt": "a", "quality": "x" * 65}, 400, "invalid_value", "quality"),
        ({"prompt": "a", "steps": 4, "num_inference_steps": 4}, 400, "unknown_parameter", "steps"),
        ({"prompt": "a", "partial_images": 4, "stream": True}, 400, "invalid_value", "partial_images"),
        ({"prompt": "a", "partial_images": 1}, 400, "invalid_value", "partial_images"),
        ({"prompt": "a", "stream": True, "n": 2}, 400, "invalid_value", "n"),
        ({"prompt": "a", "num_inference_step": 3}, 400, "unknown_parameter", "num_inference_step"),
        ({"prompt": "a", "x" * 500: 3}, 400, "unknown_parameter", "x" * 64 + "..."),
        ({"prompt": "a", "model": "sdxl"}, 404, "model_not_found", "model"),
        ({"prompt": "a", "model": "code-02"}, 404, "model_not_found", "model"),
    ],
)
def test_a_wrong_body_gets_its_own_answer(body: Any, status: int, code: str | None, param: str | None) -> None:
    answer = refusal(body)
    assert (answer.status, answer.param) == (status, param)
    assert code is None or answer.code == code
    assert len(answer.message) < 400, "nobody's input is echoed at length"
    json.dumps(error_body(answer.status, answer.message, answer.code, answer.param), allow_nan=False)


def test_an_unknown_parameter_names_the_nearest() -> None:
    assert "'num_inference_steps'" in refusal({"prompt": "a", "num_inference_step": 3}).message


def test_a_route_request_orders_no_images() -> None:
    made = to_generation_request(parse_body(RouteRequest, b'{"prompt": "a cat", "budget": 0.6}')[0], LIMITS, CATALOG)
    assert (made.prompt, made.budget) == ("a cat", 0.6)
    with pytest.raises(ApiError):
        parse_body(RouteRequest, b'{"prompt": "a cat", "n": 2}')


def test_an_answer_tells_what_each_model_is_predicted_to_lose_and_costs() -> None:
    predictions = tuple(
        Prediction(model.name, model.ratio, model.macs, loss)
        for model, loss in zip(CATALOG.models, (0.02, 0.01, 0.0), strict=True)
    )
    choice = Choice("code-01", "code-00", "overflow", (-0.03, -0.04), 0.01, (1.0, 0.9), predictions, 0.75, 7.5e8, 0.02)
    told = choice_json(choice)
    assert (told["routing"], told["price"], told["predicted_loss"]) == ("need", 0.02, 0.01)
    assert told["models"] == [
        {"id": "code-00", "ratio": 0.5, "macs": 5e8, "predicted_loss": 0.02},
        {"id": "code-01", "ratio": 0.75, "macs": 7.5e8, "predicted_loss": 0.01},
        {"id": "teacher", "ratio": 1.0, "macs": 1e9, "predicted_loss": 0.0},
    ]
    old = replace(choice, price=None, predictions=tuple(replace(each, loss=None) for each in predictions))
    told = choice_json(old)
    assert (told["routing"], told["price"], told["predicted_loss"]) == ("similarity", None, None)
    assert {model["predicted_loss"] for model in told["models"]} == {None}


def test_the_error_object_has_all_four_keys() -> None:
    for status, kind in ((400, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")):
        error = error_body(status, "no")["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == kind
