"""What crosses the server's processes: a request goes to an expert; a choice, images or an `ApiError` come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

OutputFormat = Literal["png", "jpeg", "webp"]
Reason = Literal["routed", "asked", "budget", "deadline", "price", "overflow", "cold", "cold_smaller"]
MEDIA_TYPES: Final[dict[OutputFormat, str]] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
AUTO = "auto"  # the model name that lets the router choose
TEACHER = "teacher"
RELEASE_CHANGING = "release_changing"  # the error code of a replica that was asked for another release than its own


def code_name(index: int) -> str:
    """The model name of a code: `code-00`, `code-01`, ..."""
    return f"code-{index:02d}"


@dataclass(frozen=True)
class SourceImage:
    """A picture that an image starts from.

    pixels: red, green and blue of each pixel of the drawn size, row by row. mask: a byte per pixel, 128 and more where
    it is drawn anew; None: everywhere. strength: above 0, at most 1: the share of the steps that are run.
    """

    pixels: bytes
    mask: bytes | None
    strength: float

    def steps_of(self, steps: int) -> int:
        """How many of so many steps are run: at least one."""
        return max(1, min(int(steps * self.strength), steps))


@dataclass(frozen=True)
class GenerationRequest:
    """A complete request for images: running it again gives the same images.

    seeds: one per image. size: (width, height) in pixels. file_size: to which the finished image is made larger or
    smaller; None: it is not. source: the picture that the images start from, of that size; None: noise. budget: a share
    of the teacher's MACs, or None. price: the predicted loss that all of the teacher's MACs would be worth, or None for
    the release's own. expires: seconds since the epoch after which nobody wants it. compression: quality of jpeg and
    webp, 0..100. num_previews: unfinished images wanted on the way. caller: the name of the API key it came with.
    """

    prompt: str
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    size: tuple[int, int]
    negative_prompt: str = ""
    model: str = AUTO
    budget: float | None = None
    deadline_ms: float | None = None
    price: float | None = None
    expires: float | None = None
    output_format: OutputFormat = "png"
    compression: int = 100
    num_previews: int = 0
    file_size: tuple[int, int] | None = None
    source: SourceImage | None = None
    request_id: str = ""
    caller: str = ""

    @property
    def steps(self) -> int:
        """Denoising steps of one image; one that starts from a picture leaves the first out."""
        return self.num_inference_steps if self.source is None else self.source.steps_of(self.num_inference_steps)

    @property
    def passes(self) -> int:
        """Forward passes through the UNet of one image: guidance takes a second one at each step."""
        return self.steps * (2 if self.guidance_scale > 1 else 1)


@dataclass(frozen=True)
class Prediction:
    """A served model as a prompt's candidate: its cost, and what the prompt is predicted to lose by it.

    loss: what is added to the teacher's denoising loss, 0 for the teacher; None from a router by similarity.
    """

    model: str
    ratio: float
    macs: float
    loss: float | None


@dataclass(frozen=True)
class Choice:
    """Which model a request goes to, and why.

    routed: the code with the highest of `scores`, even where the request went elsewhere. reason: overflow: another code
    had room; cold: the code sleeps, and another of its size or larger stands in; cold_smaller: a smaller one does.
    margin: the highest score minus the second. similarities: the prompt's, to every code. price: that of the scores;
    None from a router by similarity. predictions: one for every served model. ratio: the chosen model's share of the
    teacher's MACs; macs: of one forward pass at the release's resolution. expected_ms: of one image, queue included;
    None before a model was timed.
    unknown: whether the prompt is unlike those of the training; None where the release cannot tell.
    """

    model: str
    routed: str
    reason: Reason
    scores: tuple[float, ...]
    margin: float
    similarities: tuple[float, ...]
    predictions: tuple[Prediction, ...]
    ratio: float
    macs: float
    price: float | None = None
    expected_ms: float | None = None
    familiarity: float | None = None
    unknown: bool | None = None

    @property
    def routing(self) -> Literal["need", "similarity"]:
        """What the router decides by."""
        return "similarity" if self.price is None else "need"

    @property
    def predicted_loss(self) -> float | None:
        """Of the chosen model."""
        return next(each.loss for each in self.predictions if each.model == self.model)


@dataclass(frozen=True)
class ImageResult:
    """One image as bytes of a file. preview: its number among the unfinished ones, None for the finished image.
    batch_limit: of the replica that made it.
    """

    data: bytes
    seed: int
    num_text_tokens: int
    queue_ms: float
    denoise_ms: float
    batch_limit: int
    preview: int | None = None


@dataclass(frozen=True)
class Accepted:
    """An expert's first answer to a streamed request: it has a place in the queue or the batch."""


@dataclass(frozen=True)
class ModelFacts:
    """What a release says of a model. share: of the training prompts. params and share: None for the teacher."""

    name: str
    ratio: float
    macs: float
    params: int | None
    share: float | None


@dataclass(frozen=True)
class Catalog:
    """The release that is served.

    release: its identity, from the hash of release.json. size: native (width, height) in pixels. models: the codes in
    the router's order, then the teacher if it is served. familiar: the familiarity below which a prompt is unknown;
    None in a release that does not say.
    """

    release: str
    size: tuple[int, int]
    models: tuple[ModelFacts, ...]
    familiar: float | None = None

    @property
    def codes(self) -> tuple[ModelFacts, ...]:
        return tuple(model for model in self.models if model.name != TEACHER)

    def macs_of(self, request: GenerationRequest, macs: float) -> float:
        """Multiply-adds of all images of a request, from those of one pass at the native size; others by area."""
        area = (request.size[0] * request.size[1]) / (self.size[0] * self.size[1])
        return macs * request.passes * len(request.seeds) * area

    def most_macs(self, request: GenerationRequest) -> float:
        """Multiply-adds of a request by the largest model that it may go to."""
        named = [model for model in self.models if model.name == request.model]
        largest = max(named or self.models, key=lambda model: model.macs)
        return self.macs_of(request, min(largest.macs, (request.budget or 1.0) * largest.macs / largest.ratio))

    @property
    def route_macs(self) -> float:
        """What a decision without an image is charged: one pass through the smallest model."""
        return min(model.macs for model in self.models)

    def find(self, name: str) -> ModelFacts:
        return next(model for model in self.models if model.name == name)


@dataclass(frozen=True)
class ModelLoad:
    """A model as a router sees it now.

    running: images requested and not finished; steps: all denoising steps of those, done or not. step_ms: of one
    denoising step of an image, batched as it was; None before the first. replicas: that run; None before it is
    known. batch_limit: samples that one of them denoises together; None before it is known.
    """

    running: int = 0
    step_ms: float | None = None
    replicas: int | None = None
    batch_limit: int | None = None
    steps: int = 0


@dataclass(frozen=True)
class MappedPrompt:
    """A prompt, the index of its code, and where it lies."""

    prompt: str
    code: int
    place: tuple[float, float]


@dataclass(frozen=True)
class CodeMap:
    """codes: the place of each. A prompt with similarities s lies at projection (s - offset)."""

    codes: tuple[tuple[float, float], ...]
    prompts: tuple[MappedPrompt, ...]
    projection: tuple[tuple[float, ...], tuple[float, ...]]
    offset: tuple[float, ...]


class ApiError(Exception):
    """A request gets no image: what the HTTP client is told. The one error that crosses the server's processes."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s, self.retry = retry_after_s, retry

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"code": self.code, "param": self.param, "retry_after_s": self.retry_after_s, "retry": self.retry}
        return _api_error, (self.status, self.message, options)


def _api_error(status: int, message: str, options: dict[str, Any]) -> ApiError:
    return ApiError(status, message, **options)
