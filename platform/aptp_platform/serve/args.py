"""What a Serve config file says under `args:`. Ray Serve validates it against `ServeArgs`; unknown keys fail.

Ray's own `AutoscalingConfig` ignores keys that it does not know, hence a schema of ours for all of it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aptp_platform.storage.store import StorageConfig
from aptp_platform.unknown_keys import unknown_key

SIZE: Final = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
# What clients ask for when nobody told them otherwise, and no release is called.
_OPENAI_NAMES: Final = dict.fromkeys(("dall-e-*", "gpt-image-*", "chatgpt-image-*"), "auto")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(unknown_key(str(key), cls.model_fields))
        return data


class ScalingArgs(_Section):
    """How many replicas of one deployment, and how fast that changes."""

    min_replicas: int = Field(default=1, ge=0, description="0 lets it scale to zero when nobody asks for it")
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float | None = Field(
        default=None, gt=0, description="requests a replica should have; unset: a full batch"
    )
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    look_back_period_s: float = Field(default=15.0, gt=10, description="above Ray's 10 s of metrics interval")

    @model_validator(mode="after")
    def _check(self) -> ScalingArgs:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} must not be above max_replicas {self.max_replicas}: raise the latter"
            )
        return self

    def to_ray(self, target: float) -> dict[str, Any]:
        """Keywords of Ray's `AutoscalingConfig`; `target` where the config names none."""
        return {**self.model_dump(), "target_ongoing_requests": self.target_ongoing_requests or target}


class ExpertArgs(_Section):
    """One expert's deployment, or the teacher's."""

    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    num_threads: int | None = Field(default=None, ge=1, description="torch threads; unset: num_cpus, at least 1")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="samples denoised together; auto: a replica measures at its start how many pay"
    )
    largest_batch: int = Field(default=16, ge=1, description="the most that auto may find")
    measure_s: float = Field(
        default=5.0, gt=0, description="what measuring the batch size may take at a replica's start"
    )
    batching: Literal["steps", "requests"] = Field(
        default="steps", description="requests: newcomers wait for the whole batch to end; to compare with"
    )
    turns: Literal["auto", "off"] = Field(
        default="auto",
        description="replicas that share a machine's cores take turns between steps, the oldest request first; auto: "
        "on a CPU, if a replica measures at its start that asking costs next to nothing",
    )
    max_waiting: int = Field(default=8, ge=0, description="requests a replica holds ready to join the batch")
    max_queued_requests: int = Field(default=64, ge=1, description="more that wait for a replica get a 429")
    scaling: ScalingArgs = ScalingArgs()

    @property
    def batch_bound(self) -> int:
        """The most samples that a replica may denoise together, known before any was started."""
        return self.largest_batch if self.max_batch_size == "auto" else self.max_batch_size

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"


class RouterArgs(_Section):
    """The deployment that encodes prompts and picks their model."""

    num_cpus: float = Field(default=1.0, gt=0)
    num_threads: int | None = Field(default=None, ge=1)
    max_batch_size: int = Field(default=32, ge=1, description="prompts encoded together")
    batch_wait_s: float = Field(
        default=0.0, ge=0, description="for more prompts to come; while some are encoded the next gather anyway"
    )
    target_ms: float | None = Field(
        default=None, gt=0, description="of an image; a prompt whose code would miss it goes to another with room"
    )
    status_s: float = Field(default=2.0, gt=0, description="how often the replicas are counted")
    attempts: int = Field(default=3, ge=1, description="runs of a request whose replicas die")
    scaling: ScalingArgs = ScalingArgs(target_ongoing_requests=64)


class IngressArgs(_Section):
    """The deployment that speaks HTTP."""

    num_cpus: float = Field(default=0.5, gt=0)
    max_body_bytes: int = Field(default=262_144, ge=1024)
    body_timeout_s: float = Field(default=10.0, gt=0, description="a slower request body gets a 408")
    max_upload_bytes: int = Field(default=20_000_000, ge=1024, description="of a body with pictures")
    upload_timeout_s: float = Field(default=60.0, gt=0, description="a slower body with pictures gets a 408")
    request_timeout_s: float = Field(default=300.0, gt=0, description="a request that takes longer is ended with a 504")
    heartbeat_s: float = Field(default=15.0, gt=0, description="a quiet stream sends a comment this often, for proxies")
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description='pages of these origins may call the server: "https://ui.example", or "*"; none: no page',
    )
    scaling: ScalingArgs = ScalingArgs(target_ongoing_requests=64)


class ImageArgs(_Section):
    """Defaults and limits of what one request may ask for."""

    num_inference_steps: int = Field(default=25, ge=1)
    max_inference_steps: int = Field(default=100, ge=1, le=999)
    guidance_scale: float = Field(default=7.5, ge=0)
    max_guidance_scale: float = Field(default=30.0, ge=1)
    max_images: int = Field(default=10, ge=1, le=10)
    edit_strength: float = Field(
        default=0.8, gt=0, le=1, description="share of the steps that an edit without a mask runs on its picture"
    )
    mask_strength: float = Field(default=1.0, gt=0, le=1, description="the same of an edit with a mask")
    variation_strength: float = Field(default=0.6, gt=0, le=1, description="the same of a variation")
    max_prompt_chars: int = Field(default=32_000, ge=1)
    sizes: tuple[str, ...] = Field(default=(), description='"WxH", besides the release\'s own')
    other_sizes: Literal["nearest", "refuse", "resize"] = Field(
        default="nearest",
        description="asked for any other size, draw the served one of nearest shape and area; resize: then make the "
        "file as large as asked; refuse: a 400. The header x-aptp-size says what was drawn",
    )
    max_resize: int = Field(default=4096, ge=1, description="pixels of the longer side that resize may make")
    aliases: dict[str, str] = Field(
        default=_OPENAI_NAMES,
        description="other names of auto, a code or the teacher, as patterns with * and ?; the first that fits counts",
    )
    other_models: str = Field(
        default="refuse", description="what any other model name means: a served model's name, or refuse: a 404"
    )
    other_fields: Literal["refuse", "ignore"] = Field(
        default="refuse", description="fields of a body that nobody knows; ignore: the header x-aptp-ignored lists them"
    )

    @model_validator(mode="after")
    def _check(self) -> ImageArgs:
        for size in self.sizes:
            if SIZE.fullmatch(size) is None:
                raise ValueError(f'sizes: {size!r}: write "WxH" in pixels, as "512x768"')
        if self.num_inference_steps > self.max_inference_steps:
            raise ValueError(
                f"num_inference_steps {self.num_inference_steps} must not be above "
                f"max_inference_steps {self.max_inference_steps}"
            )
        return self


class LinkArgs(_Section):
    """Where images wait that were asked for as URLs (`response_format: url`)."""

    folder: str | None = Field(
        default=None,
        description="a path, file:// or s3:// URI that all ingress replicas share; unset: a temporary folder if there "
        "is one ingress replica at most, else the URL is a data: URL",
    )
    expires_s: float = Field(default=3600.0, gt=0, description="how long a URL can be fetched")
    base_url: str | None = Field(
        default=None, description='of the server as clients reach it, "https://images.example"; unset: as they did'
    )


class DecisionArgs(_Section):
    """The log of routing decisions."""

    folder: str | None = Field(default=None, description="on each router's node; unset: no log")
    prompts: Literal["hashed", "plain"] = Field(default="hashed", description="plain ones can be replayed")
    max_bytes: int = Field(default=64_000_000, ge=1_000_000)


class PageArgs(_Section):
    """The page at `/`."""

    prompts: tuple[str, ...] = Field(
        default=(
            "a smiling cat face with heart eyes", "a red apple", "the flag of Japan", "a green dragon", "a rocket",
            "a slice of pizza", "a house with a garden", "a snowman", "a police officer", "a keycap with a five",
        ),
        max_length=64,
        description="samples to try, shown on the map of the codes",
    )  # fmt: skip


class KeyArgs(_Section):
    """API keys. The keys themselves are a secret: JSON in a file, or in the environment variable APTP_API_KEYS."""

    required: bool | Literal["auto"] = Field(
        default="auto", description="auto: unless the server listens on the loopback interface alone"
    )
    file: str | None = Field(default=None, description="on each ingress's node, such as a mounted secret")


class ServeArgs(_Section):
    """A release and how it is served.

    `experts` holds for every code; `codes` says what differs for single ones, by index: `{3: {max_batch_size: 16}}`.
    `teacher` serves the full model too, where the release carries it: `true`, `false` or an expert's settings.
    """

    release: str = Field(min_length=1, description="a path, file:// or s3:// URI of a release folder")
    storage: StorageConfig = StorageConfig()
    cache: str | None = Field(
        default=None, description="where a node keeps what it fetched; unset: in the temporary folder"
    )
    experts: ExpertArgs = ExpertArgs()
    codes: dict[int, dict[str, Any]] = {}
    teacher: bool | ExpertArgs = False
    router: RouterArgs = RouterArgs()
    ingress: IngressArgs = IngressArgs()
    images: ImageArgs = ImageArgs()
    links: LinkArgs = LinkArgs()
    decisions: DecisionArgs = DecisionArgs()
    keys: KeyArgs = KeyArgs()
    page: PageArgs = PageArgs()
    drain_s: float = Field(default=120.0, gt=0, description="what a leaving replica has to finish its images")
    surge_percent: int = Field(
        default=100, ge=0, le=100, description="replicas of a new release that start before old ones leave; 0: none"
    )

    @model_validator(mode="after")
    def _check_codes(self) -> ServeArgs:
        for index in self.codes:
            if index < 0:
                raise ValueError(f"codes: {index}: must be a code's index, 0 or more")
            try:
                self.expert(index)
            except ValidationError as error:
                first = error.errors(include_url=False, include_context=False, include_input=False)[0]
                where = ".".join(map(str, ("codes", index, *first["loc"])))
                raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        return self

    def expert(self, index: int) -> ExpertArgs:
        """The settings of one code: `experts`, with what `codes` says of it laid over."""
        return ExpertArgs.model_validate(_merge(self.experts.model_dump(), self.codes.get(index, {})))

    @property
    def teacher_args(self) -> ExpertArgs | None:
        """The teacher's settings, or None if it is not to be served."""
        if isinstance(self.teacher, ExpertArgs):
            return self.teacher
        return self.experts if self.teacher else None


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
