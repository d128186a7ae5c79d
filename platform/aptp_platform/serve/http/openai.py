"""The OpenAI Images wire format: what a body may say, what answers and errors look like.

Ours beside theirs, in requests: seed, negative_prompt, num_inference_steps, guidance_scale, budget, deadline_ms, price
(an SDK sends them as `extra_body`); in answers: `seed` of each image and the object `aptp`.
"""

from __future__ import annotations

import base64
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aptp_platform.serve.args import ImageArgs
from aptp_platform.serve.messages import (
    AUTO,
    MEDIA_TYPES,
    ApiError,
    Catalog,
    Choice,
    GenerationRequest,
    ImageResult,
    OutputFormat,
)
from aptp_platform.unknown_keys import nearest

NUM_SEEDS: Final = 2**32
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SIZE: Final = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_ERROR_TYPES: Final = {403: "permission_error", 429: "rate_limit_error"}


class RouteRequest(BaseModel):
    """The body of `POST /v1/route`, and what it shares with a request for images."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str
    model: str = AUTO
    size: str = "auto"
    num_inference_steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    budget: float | None = Field(default=None, gt=0, le=1, description="share of the teacher's MACs")
    deadline_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    price: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="predicted loss that all of the teacher's MACs are worth"
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key == "prompt"}

    @field_validator("prompt")
    @classmethod
    def _printable(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("must not be empty")
        return _checked_text(text)


class ImageRequest(RouteRequest):
    """The body of `POST /v1/images/generations`. `quality`, `style` and `moderation` change nothing."""

    n: int = Field(default=1, ge=1)
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: OutputFormat = "png"
    output_compression: int = Field(default=100, ge=0, le=100)
    background: Literal["auto", "opaque"] = "auto"
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = "auto"
    style: Literal["vivid", "natural"] = "vivid"
    moderation: Literal["auto", "low"] = "auto"
    user: str = Field(default="", max_length=512)
    safety_identifier: str = Field(default="", max_length=512)
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    seed: int | None = Field(default=None, ge=0, lt=NUM_SEEDS)
    negative_prompt: str = ""

    @field_validator("negative_prompt")
    @classmethod
    def _printable_too(cls, text: str) -> str:
        return _checked_text(text)


Request = TypeVar("Request", bound=RouteRequest)


def _checked_text(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("must not hold control characters other than tab and line breaks")
    return text


def parse_request(model: type[Request], body: bytes) -> Request:
    """A body as the request that it should be; `ApiError` says what is wrong with it."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _explained(model, error) from None


def _explained(model: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    kind, param = first["type"], ".".join(map(str, first["loc"])) or None
    if kind == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first['msg']}.", code="invalid_json")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    if kind == "extra_forbidden" and param is not None:
        near = nearest(param, model.model_fields, cutoff=0.6)
        hint = f" Did you mean '{near}'?" if near else ""
        name = param if len(param) <= 64 else f"{param[:64]}..."
        return ApiError(400, f"Unknown parameter: '{name}'.{hint}", code="unknown_parameter", param=name)
    if param is None:
        return ApiError(400, "The body must be a JSON object.", code="invalid_type")
    message = first["msg"].removeprefix("Value error, ")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(400, f"Invalid '{param}': {message}.", code=code, param=param)


def to_generation_request(
    body: RouteRequest, limits: ImageArgs, catalog: Catalog, request_id: str = "", caller: str = ""
) -> GenerationRequest:
    """A body as a request, with drawn seeds where it names none; `ApiError` where it asks for more than is allowed."""
    images = body if isinstance(body, ImageRequest) else ImageRequest(prompt=body.prompt)
    steps, guidance = body.num_inference_steps, body.guidance_scale
    for name, value, limit in (
        ("prompt", len(body.prompt), limits.max_prompt_chars),
        ("negative_prompt", len(images.negative_prompt), limits.max_prompt_chars),
        ("n", images.n, limits.max_images),
        ("num_inference_steps", steps or 0, limits.max_inference_steps),
        ("guidance_scale", guidance or 0, limits.max_guidance_scale),
    ):
        if value > limit:
            rule = f"must have at most {limit} characters" if name.endswith("prompt") else f"must be at most {limit}"
            raise ApiError(400, f"Invalid '{name}': {rule}.", code="invalid_value", param=name)
    if images.stream and images.n != 1:
        raise ApiError(400, "Invalid 'n': a stream carries one image.", code="invalid_value", param="n")
    if images.partial_images and not images.stream:
        message = "Invalid 'partial_images': they need 'stream': true."
        raise ApiError(400, message, code="invalid_value", param="partial_images")
    if body.model not in (AUTO, *(model.name for model in catalog.models)):
        known = ", ".join([AUTO, *(model.name for model in catalog.models)])
        message = f"The model {body.model[:64]!r} does not exist. Known: {known}."
        raise ApiError(404, message, code="model_not_found", param="model")
    first = secrets.randbelow(NUM_SEEDS) if images.seed is None else images.seed
    return GenerationRequest(
        prompt=body.prompt,
        seeds=tuple((first + index) % NUM_SEEDS for index in range(images.n)),
        num_inference_steps=steps or limits.num_inference_steps,
        guidance_scale=limits.guidance_scale if guidance is None else guidance,
        size=parse_size(body.size, limits.sizes, catalog.size),
        negative_prompt=images.negative_prompt,
        model=body.model,
        budget=body.budget,
        deadline_ms=body.deadline_ms,
        price=body.price,
        expires=None if body.deadline_ms is None else time.time() + body.deadline_ms / 1e3,
        output_format=images.output_format,
        compression=images.output_compression,
        num_previews=images.partial_images,
        request_id=request_id[:128],
        caller=caller,
    )


def parse_size(text: str, allowed: Iterable[str], native: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of "auto" or "WxH"; an `ApiError` that lists what is served, otherwise."""
    native_text = f"{native[0]}x{native[1]}"
    if text in ("auto", native_text):
        return native
    match = _SIZE.fullmatch(text)
    if match is None or text not in allowed:
        served = ", ".join(["auto", native_text, *allowed])
        message = f"Invalid 'size': {text[:32]!r} is not served. Served: {served}."
        raise ApiError(400, message, code="invalid_value", param="size")
    return int(match[1]), int(match[2])


def images_response(
    request: GenerationRequest, choice: Choice, images: list[ImageResult], body: ImageRequest
) -> dict[str, Any]:
    """The answer to a request that was not streamed."""
    data: list[dict[str, Any]] = []
    for image in images:
        text = base64.b64encode(image.data).decode()
        if body.response_format == "url":  # a data URL: it needs no storage, and works behind any balancer
            entry = {"url": f"data:{MEDIA_TYPES[request.output_format]};base64,{text}"}
        else:
            entry = {"b64_json": text}
        data.append({**entry, "seed": image.seed})
    return {
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": request.output_format,
        "quality": "high",
        "size": _size_text(request),
        "usage": _usage(request, images),
        "aptp": choice_json(choice),
    }


def stream_event(request: GenerationRequest, image: ImageResult) -> tuple[str, dict[str, Any]]:
    """Name and data of a server-sent event."""
    kind = "image_generation.completed" if image.preview is None else "image_generation.partial_image"
    data: dict[str, Any] = {
        "type": kind,
        "b64_json": base64.b64encode(image.data).decode(),
        "created_at": int(time.time()),
        "size": _size_text(request),
        "quality": "high",
        "background": "opaque",
        "output_format": request.output_format,
    }
    if image.preview is None:
        data.update(usage=_usage(request, [image]), seed=image.seed)
    else:
        data["partial_image_index"] = image.preview
    return kind, data


def choice_json(choice: Choice) -> dict[str, Any]:
    """A choice as `aptp` in an answer and as the body of `/v1/route`'s."""
    data = asdict(choice)
    for name in ("scores", "similarities"):
        data[name] = [round(value, 8) for value in data[name]]
    data["models"] = [
        {"id": each.model, "ratio": each.ratio, "macs": each.macs, "predicted_loss": _rounded(each.loss)}
        for each in choice.predictions
    ]
    del data["predictions"]
    return {**data, "routing": choice.routing, "predicted_loss": _rounded(choice.predicted_loss)}


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 8)


def models_response(catalog: Catalog, created: int) -> dict[str, Any]:
    """`GET /v1/models`: auto, one id a code, the teacher."""
    facts: list[dict[str, Any]] = [{"id": AUTO}]
    for model in catalog.models:
        aptp = {"ratio": model.ratio, "macs": model.macs, "params": model.params, "share": model.share}
        facts.append({"id": model.name, "aptp": aptp})
    common = {"object": "model", "created": created, "owned_by": f"aptp:{catalog.release}"}
    return {"object": "list", "data": [{**each, **common} for each in facts]}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error object, all four keys."""
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _size_text(request: GenerationRequest) -> str:
    return f"{request.size[0]}x{request.size[1]}"


def _usage(request: GenerationRequest, images: list[ImageResult]) -> dict[str, Any]:
    """Text tokens read, and image tokens written: one for each 8 x 8 pixels, whatever the autoencoder."""
    text = images[0].num_text_tokens
    drawn = len(images) * (request.size[0] // 8) * (request.size[1] // 8)
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + drawn,
    }
