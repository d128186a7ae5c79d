# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from aptp.pipeline import AptpPipeline
from tests.support.tiny_release import build_release

PROMPTS = ["a red heart", "the flag of Italy", "a smiling face", "letters on a sign", "a green apple", "a dog"]
QUICK = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> AptpPipeline:
    work = tmp_path_factory.mktemp("pipeline")
    return AptpPipeline.from_release(build_release(work / "release", num_codes=2, with_teacher=True).path)


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_both_experts_are_used_and_differ(pipe):
    output = pipe(PROMPTS, seeds=[7] * 6, **QUICK)
    assert output.routes.usage().min() > 0
    assert output.images[0].size == (16, 16)
    assert len({image.tobytes() for image in output.images}) == 6


def test_an_image_does_not_depend_on_who_shares_its_batch(pipe):
    seeds = list(range(6))
    together = pipe(PROMPTS, seeds=seeds, **QUICK)
    reverse = pipe(PROMPTS[::-1], seeds=seeds[::-1], batch_size=2, **QUICK)
    for i, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, seeds=[seeds[i]], **QUICK)
        for other in (alone.images[0], reverse.images[5 - i]):
            assert np.abs(pixels(together.images[i]) - pixels(other)).max() <= 1
        assert alone.routes.indices[0] == together.routes.indices[i]


def test_it_is_the_stock_pipeline_with_the_routed_expert(pipe):
    output = pipe(PROMPTS[:1], seeds=[3], negative_prompt="blur", **QUICK)
    stock = StableDiffusionPipeline.from_pretrained(
        pipe.release.pipeline_path, unet=pipe.expert(int(output.routes.indices[0])), safety_checker=None
    )
    stock.set_progress_bar_config(disable=True)
    expected = stock(PROMPTS[0], negative_prompt="blur", generator=torch.Generator().manual_seed(3), **QUICK).images[0]
    assert np.abs(pixels(output.images[0]) - pixels(expected)).max() <= 1


def test_seeds_make_the_image_and_are_told(pipe):
    drawn = pipe(PROMPTS[:2], generator=torch.Generator().manual_seed(5), **QUICK)
    again = pipe(PROMPTS[:2], seeds=drawn.seeds, **QUICK)
    other = pipe(PROMPTS[:2], seeds=[seed + 1 for seed in drawn.seeds], **QUICK)
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in again.images]
    assert drawn.images[0].tobytes() != other.images[0].tobytes()
    assert len(set(drawn.seeds)) == 2


def test_the_teacher_makes_all_images_when_asked(pipe):
    teacher = pipe(PROMPTS[:2], seeds=[1, 2], use_teacher=True, **QUICK)
    experts = pipe(PROMPTS[:2], seeds=[1, 2], **QUICK)
    assert teacher.images[0].tobytes() != experts.images[0].tobytes()
    assert sum(p.numel() for p in pipe.teacher.parameters()) > sum(p.numel() for p in pipe.expert(0).parameters())


def test_illegal_calls_are_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="at least one prompt"):
        pipe([])
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        pipe(PROMPTS[:2], seeds=[1])
    with pytest.raises(ValueError, match=r"codes 0\.\.1"):
        pipe.expert(2)
    bare = AptpPipeline.from_release(build_release(tmp_path / "release", num_codes=2, with_teacher=False).path)
    assert bare.teacher is None
    with pytest.raises(ValueError, match="published without its teacher"):
        bare("a cat", use_teacher=True)


def test_an_image_without_numbers_is_an_error(pipe):
    with pytest.raises(FloatingPointError, match=r"a red heart.*not finite"):
        pipe(PROMPTS[0], seeds=[3], num_inference_steps=3, guidance_scale=1e38)
