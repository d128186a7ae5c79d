"""One expert by itself: which requests it turns away, in words, and that it makes the same image again."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aptp_platform.serve.args import ExpertArgs
from aptp_platform.serve.engine.expert import Expert
from aptp_platform.serve.messages import RELEASE_CHANGING, ApiError, Catalog, GenerationRequest, ImageResult
from aptp_platform.serve.release_source import ReleaseSource
from tests.support.tiny_release import build_release

REQUEST = GenerationRequest("a red cat", (1,), num_inference_steps=3, guidance_scale=3.0, size=(16, 16))
LONG = replace(REQUEST, num_inference_steps=90)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ReleaseSource:
    folder: Path = tmp_path_factory.mktemp("expert") / "release"
    return ReleaseSource(str(build_release(folder, num_codes=1, with_teacher=False).path))


def run(source: ReleaseSource, use: Callable[[Expert, Catalog], Awaitable[Any]], **settings: Any) -> Any:
    catalog = source.catalog(with_teacher=False)
    expert = Expert(source, catalog, "code-00", ExpertArgs(**{"max_batch_size": 1, "max_waiting": 1, **settings}))

    async def main() -> Any:
        return await asyncio.wait_for(use(expert, catalog), 60)

    return asyncio.run(main())


def test_a_request_that_is_run_again_is_the_same_image_byte_for_byte(source: ReleaseSource) -> None:
    async def use(expert: Expert, catalog: Catalog) -> list[ImageResult | ApiError]:
        return [await expert.generate(REQUEST, 1, catalog.release) for _ in range(2)]

    first, second = run(source, use, max_batch_size="auto", largest_batch=4, measure_s=0.5)
    assert first.data == second.data
    assert 1 <= first.batch_limit <= 4, "measured"


def test_a_request_that_expired_in_the_queue_should_log_so_and_not_begun(source: ReleaseSource) -> None:
    async def use(expert: Expert, catalog: Catalog) -> None:
        long = asyncio.ensure_future(expert.generate(LONG, 1, catalog.release))
        await asyncio.sleep(0.05)
        refusal = await expert.generate(replace(REQUEST, expires=time.time() + 0.05), 1, catalog.release)
        assert isinstance(refusal, ApiError), "a value: what is raised in a replica, Serve logs with its traceback"
        assert (refusal.status, refusal.code, refusal.retry) == (504, "deadline_exceeded", False)
        assert not long.done()
        assert isinstance(await long, ImageResult)

    run(source, use)


def test_a_full_replica_and_another_release_are_turned_away(source: ReleaseSource) -> None:
    async def use(expert: Expert, catalog: Catalog) -> None:
        refusals = [await expert.generate(REQUEST, 1, "another"), await expert.wake("another")]
        refusals += [item async for item in expert.stream(REQUEST, 1, "another") if isinstance(item, ApiError)]
        assert [(each.status, each.code) for each in refusals if isinstance(each, ApiError)] == [
            (503, RELEASE_CHANGING)
        ] * 3
        requests = [asyncio.ensure_future(expert.generate(LONG, seed, catalog.release)) for seed in range(3)]
        await asyncio.sleep(0.05)
        refusal = await requests[2]
        assert isinstance(refusal, ApiError)
        assert (refusal.status, refusal.code) == (429, "rate_limit_exceeded")
        assert (refusal.retry_after_s or 0) >= 1
        await asyncio.gather(*requests[:2])

    run(source, use)
