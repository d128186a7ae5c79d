"""The step engine: whoever shares the batch, an image is what the stock pipeline makes of its prompt and seed alone."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
)
from PIL import Image

from aptp_platform.serve.engine.batch_size import best_batch_size
from aptp_platform.serve.engine.batching import Cycle, EngineFullError, StepEngine, TooLateError
from aptp_platform.serve.engine.denoising import Denoiser, NotFiniteError, SampleSpec
from aptp_platform.serve.messages import SourceImage
from tests.support.tiny_pipeline import build_pipeline

T = TypeVar("T")
CAT = SampleSpec("a red cat", seed=7, num_inference_steps=5, guidance_scale=4.0, size=(16, 16))
COMPANY = (
    replace(CAT, prompt="blue", seed=1, num_inference_steps=3, guidance_scale=1.0),
    replace(CAT, prompt="an old house by the sea", seed=2, num_inference_steps=8, negative_prompt="fog"),
    replace(CAT, prompt="wide", seed=3, size=(24, 16)),
    replace(CAT, seed=8),
)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return build_pipeline()


def denoiser_of(pipeline: Any, scheduler: Any = None) -> Denoiser:
    parts = (pipeline.unet, pipeline.vae, pipeline.tokenizer, pipeline.text_encoder)
    return Denoiser(*parts, scheduler or pipeline.scheduler)


@pytest.fixture
def denoiser(pipeline: Any) -> Denoiser:
    return denoiser_of(pipeline)


def stock_image(pipeline: Any, spec: SampleSpec, scheduler: Any = None) -> torch.Tensor:
    stock = StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": scheduler or pipeline.scheduler}, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    image = stock(
        spec.prompt,
        negative_prompt=spec.negative_prompt,
        width=spec.size[0],
        height=spec.size[1],
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        generator=torch.Generator().manual_seed(spec.seed),
        output_type="np",
    ).images[0]
    return torch.from_numpy(image).mul(255).round().to(torch.uint8)


def distance(one: torch.Tensor, other: torch.Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def run(denoiser: Denoiser, use: Callable[[StepEngine], Awaitable[T]], **options: Any) -> T:
    async def main() -> T:
        engine = StepEngine(denoiser, **{"max_batch_size": 8, "max_waiting": 8, **options})
        try:
            return await asyncio.wait_for(use(engine), 60)
        finally:
            await engine.close()

    return asyncio.run(main())


@pytest.mark.parametrize("spec", [CAT, *COMPANY])
def test_alone_it_is_the_stock_pipeline_s_image(pipeline: Any, denoiser: Denoiser, spec: SampleSpec) -> None:
    rendered = run(denoiser, lambda engine: engine.generate(spec))
    assert rendered.preview is None
    assert distance(rendered.pixels, stock_image(pipeline, spec)) <= 1


def painted(mask: bool, strength: float, size: tuple[int, int] = (16, 16)) -> SourceImage:
    """A picture of noise, and a mask of its right half."""
    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    anew = torch.zeros(height, width, dtype=torch.uint8)
    anew[:, width // 2 :] = 255
    return SourceImage(bytes(pixels.flatten().tolist()), bytes(anew.flatten().tolist()) if mask else None, strength)


def stock_edit(pipeline: Any, spec: SampleSpec, scheduler: Any) -> torch.Tensor:
    """What diffusers' own pipelines make of a picture."""
    source = spec.source
    assert source is not None
    image = Image.frombytes("RGB", spec.size, source.pixels)
    options: dict[str, Any] = {"image": image, "strength": source.strength}
    kind: Any = StableDiffusionImg2ImgPipeline
    if source.mask is not None:
        kind = StableDiffusionInpaintPipeline
        options |= {"mask_image": Image.frombytes("L", spec.size, source.mask), "width": spec.size[0]}
        options |= {"height": spec.size[1]}
    stock = kind(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    made = stock(
        spec.prompt,
        negative_prompt=spec.negative_prompt,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        generator=torch.Generator().manual_seed(spec.seed),
        output_type="np",
        **options,
    )
    return torch.from_numpy(made.images[0]).mul(255).round().to(torch.uint8)


@pytest.mark.parametrize(("mask", "strength"), [(False, 0.5), (False, 1.0), (True, 0.6), (True, 1.0)])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_an_edit_in_company_is_the_stock_pipeline_s(pipeline: Any, kind: Any, mask: bool, strength: float) -> None:
    scheduler = kind.from_config(pipeline.scheduler.config)
    spec = replace(CAT, source=painted(mask, strength))
    wide = replace(COMPANY[2], source=painted(mask, strength, (24, 16)))

    async def use(engine: StepEngine) -> list[torch.Tensor]:
        images = await asyncio.gather(*(engine.generate(each) for each in (spec, *COMPANY, wide)))
        return [image.pixels for image in images]

    images = run(denoiser_of(pipeline, scheduler), use)
    assert distance(images[0], stock_edit(pipeline, spec, scheduler)) <= 1
    assert distance(images[-1], stock_edit(pipeline, wide, scheduler)) <= 1
    assert distance(images[1], stock_image(pipeline, COMPANY[0], scheduler)) <= 1, "company's own image is its own"
    assert distance(images[0], images[4]) > 1


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        PNDMScheduler,
        TCDScheduler,  # whose own eta is not the stock pipeline's
    ],
)
def test_every_stock_scheduler_keeps_its_state_for_each_sample(pipeline: Any, kind: Any) -> None:
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}  # as Stable Diffusion's own configuration does
    scheduler = kind.from_config(pipeline.scheduler.config, **options)

    async def use(engine: StepEngine) -> torch.Tensor:
        images = await asyncio.gather(*(engine.generate(spec) for spec in (CAT, *COMPANY)))
        return images[0].pixels

    pixels = run(denoiser_of(pipeline, scheduler), use)
    assert distance(pixels, stock_image(pipeline, CAT, scheduler)) <= 1


def test_a_picture_without_numbers_is_an_error_and_its_company_s_are_not(pipeline: Any, denoiser: Denoiser) -> None:
    broken = replace(CAT, guidance_scale=1e38)

    async def use(engine: StepEngine) -> list[Any]:
        return await asyncio.gather(*(engine.generate(each) for each in (broken, CAT)), return_exceptions=True)

    lost, made = run(denoiser, use)
    assert isinstance(lost, NotFiniteError)
    assert distance(made.pixels, stock_image(pipeline, CAT)) <= 1


def test_company_and_time_of_joining_change_nothing(pipeline: Any, denoiser: Denoiser) -> None:
    """Five specs, each joining one step after the one before: mixed steps, sizes, guidance and seeds."""

    async def use(engine: StepEngine) -> list[torch.Tensor]:
        tasks = []
        for spec in (*COMPANY, CAT):
            tasks.append(asyncio.ensure_future(engine.generate(spec)))
            await asyncio.sleep(0.02)
        return [(await task).pixels for task in tasks]

    cycles: list[Cycle] = []
    together = run(denoiser, use, observe=cycles.append)
    assert max(cycle.batch_size for cycle in cycles) > 1
    for spec, pixels in zip((*COMPANY, CAT), together, strict=True):
        assert distance(pixels, stock_image(pipeline, spec)) <= 1


def test_a_request_joins_the_running_batch_at_the_next_step(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> float:
        long = asyncio.ensure_future(engine.generate(replace(CAT, num_inference_steps=60)))
        while engine.cycle_s == 0:
            await asyncio.sleep(0.001)
        await engine.generate(replace(CAT, num_inference_steps=2))
        assert not long.done()
        return (await long).denoise_ms

    cycles: list[Cycle] = []
    run(denoiser, use, observe=cycles.append)
    sizes = [cycle.batch_size for cycle in cycles]
    assert len(sizes) == 60, "the second request took no step of its own"
    assert sizes.count(2) == 2
    assert sizes[0] == 1


def test_no_more_than_the_batch_limit_runs_and_the_rest_waits_in_order(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> list[int]:
        done: list[int] = []

        async def one(seed: int) -> None:
            await engine.generate(replace(CAT, seed=seed))
            done.append(seed)

        await asyncio.gather(*map(one, range(5)))
        return done

    cycles: list[Cycle] = []
    assert run(denoiser, use, max_batch_size=2, observe=cycles.append) == [0, 1, 2, 3, 4]
    assert max(cycle.batch_size for cycle in cycles) == 2


def test_a_full_queue_refuses_with_the_time_it_needs(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> EngineFullError:
        first = asyncio.ensure_future(engine.generate(replace(CAT, num_inference_steps=30)))
        while engine.cycle_s == 0:
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(engine.generate(CAT))
        await asyncio.sleep(0)
        with pytest.raises(EngineFullError) as full:
            await engine.generate(CAT)
        started = time.monotonic()
        await asyncio.gather(first, second)
        assert full.value.retry_after_s < 20 * (time.monotonic() - started)
        return full.value

    assert run(denoiser, use, max_batch_size=1, max_waiting=1).retry_after_s > 0


def test_a_request_whose_time_is_over_before_it_began_should_log_so_at_once(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> None:
        long = asyncio.ensure_future(engine.generate(replace(CAT, num_inference_steps=60)))
        while engine.cycle_s == 0:
            await asyncio.sleep(0.001)
        with engine.submit(CAT, expires_in_s=0.001) as late, engine.submit(CAT, expires_in_s=60) as patient:
            with pytest.raises(TooLateError):
                await anext(late.images())
            assert not long.done()
            assert (await anext(patient.images())).preview is None
        assert (await long).preview is None, "what was begun is finished"

    run(denoiser, use, max_batch_size=1)


def test_whole_request_batching_lets_nobody_in_before_all_are_done(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> None:
        first = asyncio.ensure_future(engine.generate(replace(CAT, num_inference_steps=20)))
        while engine.cycle_s == 0:
            await asyncio.sleep(0.001)
        await engine.generate(replace(CAT, num_inference_steps=2))
        assert first.done()

    cycles: list[Cycle] = []
    run(denoiser, use, whole_requests=True, observe=cycles.append)
    assert [cycle.batch_size for cycle in cycles] == [1] * 22


class Clocked:
    """A denoiser whose step lasts as long as `seconds` says for its batch."""

    def __init__(self, denoiser: Denoiser, seconds: Callable[[int], float]) -> None:
        self._denoiser, self._seconds = denoiser, seconds
        self.batches: list[int] = []

    def admit(self, specs: Any) -> Any:
        return self._denoiser.admit(specs)

    def step(self, samples: Any) -> None:
        self.batches.append(len(samples))
        time.sleep(self._seconds(len(samples)))


@pytest.mark.parametrize(
    ("seconds", "largest", "found"),
    [
        (lambda batch: 0.004 * batch, 16, 1),  # bound by arithmetic from the start
        (lambda batch: 0.02, 4, 4),  # company is free
        (lambda batch: 0.02 if batch <= 4 else 0.005 * batch, 16, 4),
        (lambda batch: 0.02, 6, 6),  # the bound need not be a power of two
    ],
)
def test_the_batch_that_saturates_is_found(denoiser: Denoiser, seconds: Any, largest: int, found: int) -> None:
    clocked: Any = Clocked(denoiser, seconds)
    assert best_batch_size(clocked, (16, 16), largest=largest, seconds=30) == found


def test_measuring_keeps_to_its_time_and_survives_a_full_memory(denoiser: Denoiser) -> None:
    slow: Any = Clocked(denoiser, lambda batch: 0.05)
    assert best_batch_size(slow, (16, 16), largest=64, seconds=0.01) == 1
    assert slow.batches == [1]

    def full(batch: int) -> float:
        if batch > 2:
            raise RuntimeError("out of memory")
        return 0.01

    small: Any = Clocked(denoiser, full)
    assert best_batch_size(small, (16, 16), largest=64, seconds=30) == 2


def test_a_cancelled_request_leaves_at_the_next_step(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> None:
        task = asyncio.ensure_future(engine.generate(replace(CAT, num_inference_steps=900)))
        waiting = asyncio.ensure_future(engine.generate(CAT))
        while engine.cycle_s == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        await waiting  # gets the place that became free
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (engine.running, engine.waiting) == (0, 0)

    cycles: list[Cycle] = []
    run(denoiser, use, max_batch_size=1, observe=cycles.append)
    assert len(cycles) < 50


def test_previews_come_before_the_image_and_do_not_change_it(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> list[Any]:
        with engine.submit(replace(CAT, num_previews=3)) as handle:
            return [image async for image in handle.images()]

    images = run(denoiser, use)
    assert [image.preview for image in images] == [0, 1, 2, None]
    assert distance(images[-1].pixels, run(denoiser, lambda engine: engine.generate(CAT)).pixels) == 0
    distances = [distance(image.pixels, images[-1].pixels) for image in images]
    assert all(earlier >= later for earlier, later in pairwise(distances))
    assert distances[0] > 0


def test_counting_a_prompt_s_tokens_leaves_alone_what_another_thread_encodes_with(
    pipeline: Any, denoiser: Denoiser
) -> None:
    """A fast tokenizer keeps the padding of its last call: counted with the same one while another thread was between
    setting it and reading, a prompt came out unpadded, and everybody's step failed."""
    denoiser.admit([CAT])
    padding = pipeline.tokenizer.backend_tokenizer.padding
    assert padding is not None
    assert denoiser.count_tokens(CAT.prompt) < pipeline.tokenizer.model_max_length
    assert pipeline.tokenizer.backend_tokenizer.padding == padding


def test_the_event_loop_is_free_while_a_step_runs(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> float:
        task = asyncio.ensure_future(engine.generate(replace(CAT, num_inference_steps=30)))
        worst = 0.0
        while not task.done():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            worst = max(worst, time.monotonic() - before)
        elapsed = (await task).denoise_ms / 1e3
        return worst / elapsed

    assert run(denoiser, use) < 0.5


def test_a_spec_that_cannot_start_fails_alone(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> None:
        first = asyncio.ensure_future(engine.generate(CAT))
        second = asyncio.ensure_future(engine.generate(replace(CAT, num_inference_steps=2000)))
        third = asyncio.ensure_future(engine.generate(CAT))
        with pytest.raises(ValueError, match="2000"):
            await second
        assert distance((await first).pixels, (await third).pixels) <= 1
        assert (engine.running, engine.waiting) == (0, 0)

    run(denoiser, use)


def test_a_failing_step_fails_its_company_and_nobody_else(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> None:
        with pytest.raises(RuntimeError):
            await engine.generate(replace(CAT, size=(1, 1)))  # no latents at all
        assert (await engine.generate(CAT)).pixels.shape == (16, 16, 3)
        engine.check()

    run(denoiser, use)


def test_closing_tells_those_who_wait(denoiser: Denoiser) -> None:
    async def use(engine: StepEngine) -> None:
        task = asyncio.ensure_future(engine.generate(replace(CAT, num_inference_steps=900)))
        await asyncio.sleep(0.05)
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await task
        with pytest.raises((RuntimeError, asyncio.CancelledError)):
            engine.submit(CAT)

    run(denoiser, use)
