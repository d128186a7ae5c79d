"""The OpenAI Images wire format: a body becomes a request; what answers and errors look like.

Ours beside theirs in answers: `seed` of each image and the object `aptp`.
"""

from __future__ import annotations

import base64
import re
import secrets
import time
from dataclasses import asdict
from typing import Any, Final

from aptp_platform.serve.args import ImageArgs
from aptp_platform.serve.http.wire.fields import NUM_SEEDS, ImageRequest, RouteRequest
from aptp_platform.serve.http.wire.substitutes import model_of, size_of
from aptp_platform.serve.messages import (
    AUTO,
    MEDIA_TYPES,
    ApiError,
    Catalog,
    Choice,
    GenerationRequest,
    ImageResult,
)

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a field: what a header may repeat
_MOST_TOLD: Final = 32  # fields
_ERROR_TYPES: Final = {403: "permission_error", 429: "rate_limit_error"}


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
    model, size = model_of(body.model, limits, catalog), size_of(body.size, limits, catalog.size)
    first = secrets.randbelow(NUM_SEEDS) if images.seed in (None, -1) else images.seed
    return GenerationRequest(
        prompt=body.prompt,
        seeds=tuple((first + index) % NUM_SEEDS for index in range(images.n)),
        num_inference_steps=steps or limits.num_inference_steps,
        guidance_scale=limits.guidance_scale if guidance is None else guidance,
        size=size.drawn,
        file_size=size.resized,
        negative_prompt=images.negative_prompt,
        model=model,
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


def adaptations(body: RouteRequest, unknown: list[str], limits: ImageArgs, catalog: Catalog) -> dict[str, str]:
    """Headers that say what was made of the request: the size that is drawn, and the fields without effect."""
    told = {"x-aptp-size": size_of(body.size, limits, catalog.size).told}
    ignored = body.without_effect if isinstance(body, ImageRequest) else []
    ignored = [*ignored, *(name for name in unknown if _NAME.fullmatch(name))]
    if ignored:
        told["x-aptp-ignored"] = ", ".join(ignored[:_MOST_TOLD])
    return told


def images_response(
    request: GenerationRequest, choice: Choice, images: list[ImageResult], urls: list[str] | None = None
) -> dict[str, Any]:
    """The answer to a request that was not streamed. urls: of the images, where URLs were asked for."""
    if urls is None:
        entries = [{"b64_json": base64.b64encode(image.data).decode()} for image in images]
    else:
        entries = [{"url": url} for url in urls]
    data = [{**entry, "seed": image.seed} for entry, image in zip(entries, images, strict=True)]
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


def data_url(request: GenerationRequest, image: ImageResult) -> str:
    """An image that is its own URL."""
    return f"data:{MEDIA_TYPES[request.output_format]};base64,{base64.b64encode(image.data).decode()}"


def stream_event(request: GenerationRequest, image: ImageResult) -> tuple[str, dict[str, Any]]:
    """Name and data of a server-sent event."""
    what = "image_generation" if request.source is None else "image_edit"
    kind = f"{what}.completed" if image.preview is None else f"{what}.partial_image"
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
    width, height = request.file_size or request.size
    return f"{width}x{height}"


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
