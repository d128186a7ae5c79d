"""What the body of a request may say: OpenAI's fields, ours, and the names that other servers have for them.

Ours beside theirs: seed, negative_prompt, num_inference_steps, guidance_scale, budget, deadline_ms, price (an SDK sends
them as `extra_body`). `docs/serving.md` has every field with its rule.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aptp_platform.serve.messages import AUTO, ApiError, OutputFormat
from aptp_platform.unknown_keys import nearest

NUM_SEEDS: Final = 2**32
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SYNONYMS: Final = {
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "true_cfg_scale": "guidance_scale",
}
# Understood, and without effect: the value that asks for nothing else than what happens anyway.
_WITHOUT_EFFECT: Final = {
    "quality": ("auto",),
    "style": ("auto",),
    "moderation": ("auto",),
    "complexity": ("auto",),
    "background": ("auto", "opaque"),
    "input_fidelity": ("auto",),
}

_Short = Field(default="auto", max_length=64)


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
    def _known_names(cls, data: Any) -> Any:
        """Null is absent, and what other servers call a field is that field."""
        if not isinstance(data, dict):
            return data
        told = {key: value for key, value in data.items() if value is not None or key == "prompt"}
        for name, field in _SYNONYMS.items():
            if name in told and field not in told:
                told[field] = told.pop(name)
        if "size" not in told and {"width", "height"} <= told.keys():
            told["size"] = f"{told.pop('width')}x{told.pop('height')}"
        return told

    @field_validator("prompt")
    @classmethod
    def _printable(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("must not be empty")
        return _checked_text(text)


class ImageRequest(RouteRequest):
    """The body of `POST /v1/images/generations`."""

    n: int = Field(default=1, ge=1)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: OutputFormat = "png"
    output_compression: int = Field(default=100, ge=0, le=100)
    background: str = _Short
    quality: str = _Short
    style: str = _Short
    moderation: str = _Short
    complexity: str = _Short
    metadata: dict[str, Any] | str = Field(default="", description="whatever a client keeps there")
    user: str = Field(default="", max_length=512)
    safety_identifier: str = Field(default="", max_length=512)
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    seed: int | None = Field(default=None, ge=-1, lt=NUM_SEEDS, description="-1: drawn, as if absent")
    negative_prompt: str = ""

    @field_validator("negative_prompt")
    @classmethod
    def _printable_too(cls, text: str) -> str:
        return _checked_text(text)

    @property
    def wants_urls(self) -> bool:
        """Who names no format gets what OpenAI's model of that name sends: dall-e URLs, all others base64."""
        if self.response_format is None:
            return self.model.rpartition("/")[2].startswith("dall-e-")
        return self.response_format == "url"

    @property
    def without_effect(self) -> list[str]:
        """Fields that asked for something which this server has no choice of."""
        return [name for name, neutral in _WITHOUT_EFFECT.items() if getattr(self, name, "auto") not in neutral]


class EditRequest(ImageRequest):
    """The fields of `POST /v1/images/edits`; pictures come beside them."""

    strength: float | None = Field(default=None, gt=0, le=1, description="share of the steps that are run")
    input_fidelity: str = _Short


class VariationRequest(EditRequest):
    """The fields of `POST /v1/images/variations`."""

    prompt: str = ""


Body = TypeVar("Body", bound=RouteRequest)


def _checked_text(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("must not hold control characters other than tab and line breaks")
    return text


def parse_body(model: type[Body], body: bytes, *, ignore_unknown: bool = False) -> tuple[Body, list[str]]:
    """A JSON body as the request that it should be, and the fields that it named and nobody knows.

    Raises:
        ApiError: it says what is wrong; of an unknown field too, unless `ignore_unknown`.
    """
    try:
        if not ignore_unknown:
            return model.model_validate_json(body), []
        lenient = _lenient(model)
        parsed = lenient.model_validate_json(body)
        return parsed, sorted(parsed.__pydantic_extra__ or ())
    except ValidationError as error:
        raise _explained(model, error) from None


def parse_fields(model: type[Body], fields: dict[str, str], *, ignore_unknown: bool = False) -> tuple[Body, list[str]]:
    """As `parse_body`, of a form's fields; an empty one is absent."""
    told = {name: value for name, value in fields.items() if value or name == "prompt"}
    try:
        if not ignore_unknown:
            return model.model_validate_strings(told, strict=False), []
        parsed = _lenient(model).model_validate_strings(told, strict=False)
        return parsed, sorted(parsed.__pydantic_extra__ or ())
    except ValidationError as error:
        raise _explained(model, error) from None


def _lenient(model: type[Body]) -> type[Body]:
    """The same body, which takes fields that nobody knows."""
    return type(model.__name__, (model,), {"model_config": ConfigDict(extra="allow"), "__module__": __name__})


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
