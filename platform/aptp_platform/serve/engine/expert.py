"""The deployment of one model: a cut UNet, or the teacher, behind its own step engine."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from aptp.expert import load_expert
from aptp.release import Release
from aptp_platform.serve.args import ExpertArgs
from aptp_platform.serve.cpu.turns import Turns, turns_if_cheap
from aptp_platform.serve.engine.batch_size import best_batch_size
from aptp_platform.serve.engine.batching import EngineFullError, Rendered, RequestHandle, StepEngine, TooLateError
from aptp_platform.serve.engine.denoising import Denoiser, NotFiniteError, Sample, SampleSpec
from aptp_platform.serve.engine.images import encode_image
from aptp_platform.serve.engine.metrics import ExpertMetrics
from aptp_platform.serve.messages import (
    RELEASE_CHANGING,
    TEACHER,
    Accepted,
    ApiError,
    Catalog,
    GenerationRequest,
    ImageResult,
)
from aptp_platform.serve.release_source import ReleaseSource

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOG = logging.getLogger("ray.serve")


class Expert:
    """Images of one model. The same request gives the same image again."""

    def __init__(self, source: ReleaseSource, catalog: Catalog, model: str, args: ExpertArgs) -> None:
        torch.set_num_threads(args.num_threads or max(1, int(args.num_cpus)))
        self._catalog, self._model = catalog, model
        index = None if model == TEACHER else [code.name for code in catalog.codes].index(model)
        self._denoiser = load_denoiser(source.for_model(model), index, device=args.device, dtype=_DTYPES[args.dtype])
        self._warm_up()
        self._batch_limit = self._measured_batch_size(args) if args.max_batch_size == "auto" else args.max_batch_size
        metrics = ExpertMetrics(model, self._batch_limit)
        self._engine = StepEngine(
            self._denoiser,
            max_batch_size=self._batch_limit,
            # Serve gives this many to a replica, whatever batch it settled on.
            max_waiting=args.batch_bound + args.max_waiting - self._batch_limit,
            whole_requests=args.batching == "requests",
            turns=self._measured_turns(args),
            observe=metrics.observe,
        )

    async def generate(self, request: GenerationRequest, seed: int, release: str) -> ImageResult | ApiError:
        """The request's image for one of its seeds, by the release that its choice was made for; or a refusal.

        That is a 429 when too many wait already, 500 when the picture's numbers are not finite, 503 when this replica
        is of another release, 504 when the request expired while it waited.
        """
        try:
            with self._submit(request, seed, release, num_previews=0) as handle, _as_api_error():
                images = [image async for image in handle.images()]
        except ApiError as refusal:
            return refusal
        return await asyncio.to_thread(self._result, request, seed, images[-1])

    async def stream(
        self, request: GenerationRequest, seed: int, release: str
    ) -> AsyncIterator[Accepted | ImageResult | ApiError]:
        """`Accepted` at once, then the previews that the request wants, then the image; a refusal ends it."""
        try:
            with self._submit(request, seed, release, num_previews=request.num_previews) as handle, _as_api_error():
                yield Accepted()
                async for image in handle.images():
                    yield await asyncio.to_thread(self._result, request, seed, image)
        except ApiError as refusal:
            yield refusal

    async def wake(self, release: str) -> ApiError | None:
        """No-op that checks the release. A pending call makes Serve scale the deployment up from zero."""
        try:
            self._check_release(release)
        except ApiError as refusal:
            return refusal
        return None

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose engine has ended."""
        self._engine.check()

    def _warm_up(self) -> None:
        """The first step of a process is slow; no request should be the one to find out."""
        spec = SampleSpec("", seed=0, num_inference_steps=1, guidance_scale=2.0, size=self._catalog.size)
        samples = [sample for sample in self._denoiser.admit([spec]) if isinstance(sample, Sample)]
        self._denoiser.step(samples)
        self._denoiser.decode(samples)

    def _measured_batch_size(self, args: ExpertArgs) -> int:
        limit = best_batch_size(self._denoiser, self._catalog.size, largest=args.largest_batch, seconds=args.measure_s)
        _LOG.info("%s denoises up to %d samples together", self._model, limit)
        return limit

    def _measured_turns(self, args: ExpertArgs) -> Turns | None:
        """On as many cores as this process may use, one turn for each replica that they hold."""
        if args.turns == "off" or args.device != "cpu" or args.batching == "requests":
            return None
        at_once = max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads())
        turns = turns_if_cheap("cpu", at_once, self._warm_up)
        _LOG.info("%s takes %s", self._model, f"one of {at_once} turns" if turns else "no turns: asking costs too much")
        return turns

    def _check_release(self, release: str) -> None:
        if release != self._catalog.release:
            message = "Another release is being rolled out; try again."
            raise ApiError(503, message, code=RELEASE_CHANGING, retry_after_s=5.0)

    def _submit(self, request: GenerationRequest, seed: int, release: str, num_previews: int) -> RequestHandle:
        self._check_release(release)
        expires_in_s = math.inf if request.expires is None else request.expires - time.time()
        spec = SampleSpec(
            prompt=request.prompt,
            seed=seed,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            size=request.size,
            negative_prompt=request.negative_prompt,
            num_previews=num_previews,
            source=request.source,
        )
        try:
            return self._engine.submit(spec, expires_in_s)
        except EngineFullError as full:
            message = f"{self._model} has no room; try again later."
            raise ApiError(
                429, message, code="rate_limit_exceeded", retry_after_s=max(full.retry_after_s, 1.0)
            ) from None

    def _result(self, request: GenerationRequest, seed: int, image: Rendered) -> ImageResult:
        facts = {
            "seed": str(seed),
            "code": self._model,
            "release": self._catalog.release,
            "num_inference_steps": str(request.num_inference_steps),
            "guidance_scale": f"{request.guidance_scale:g}",
        }
        size = request.file_size if image.preview is None else None
        data = encode_image(
            image.pixels,
            request.output_format,
            compression=request.compression,
            size=size,
            edited=request.source is not None,
            facts=facts,
        )
        return ImageResult(
            data=data,
            seed=seed,
            num_text_tokens=self._denoiser.count_tokens(request.prompt),
            queue_ms=image.queue_ms,
            denoise_ms=image.denoise_ms,
            batch_limit=self._batch_limit,
            preview=image.preview,
        )


@contextmanager
def _as_api_error() -> Iterator[None]:
    try:
        yield
    except TooLateError:
        message = "The request waited in the queue until its 'deadline_ms' was over; it was not begun."
        raise ApiError(504, message, code="deadline_exceeded", param="deadline_ms", retry=False) from None
    except NotFiniteError as error:
        raise ApiError(500, f"No image was made: {error}.", code="not_finite", retry=False) from None


def load_denoiser(release: Release, index: int | None, *, device: str, dtype: torch.dtype) -> Denoiser:
    """A code's expert, or for None the teacher, among the frozen parts of the release's pipeline."""
    unet: Any
    if index is None:
        unet = UNet2DConditionModel.from_pretrained(release.teacher_path, use_safetensors=True, low_cpu_mem_usage=False)
    else:
        unet = load_expert(release.expert_path(index))
    parts = StableDiffusionPipeline.from_pretrained(
        release.pipeline_path,
        unet=unet.to(dtype).eval().requires_grad_(False),
        safety_checker=None,
        requires_safety_checker=False,
        use_safetensors=True,
        torch_dtype=dtype,
        low_cpu_mem_usage=False,  # True needs `accelerate`, and warns at length without it
    ).to(device)
    return Denoiser(parts.unet, parts.vae, parts.tokenizer, parts.text_encoder, parts.scheduler)
