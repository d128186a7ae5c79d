"""The router learns what the trained experts cost, as anybody can measure it, and meets the budget with them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aptp.cost import cost_table
from aptp.expert import load_expert
from aptp.latents import encode_texts
from aptp.losses import NoiseSchedule
from aptp.router import Router
from aptp.routes import RouterConfig
from aptp.sites import read_space
from aptp_platform.config import RunConfig
from aptp_platform.experts import refit as stage
from aptp_platform.experts.cut import cut
from aptp_platform.experts.refit import refit
from aptp_platform.models import load_pipeline_parts
from aptp_platform.run.layout import refitted_router
from aptp_platform.storage.store import Store
from tests.support import tiny
from tests.support.tiny_run import DIM, tiny_run

BUDGET = 0.6


def a_run(folder: Path, routing: str) -> RunConfig:
    """Two experts, cut and not trained further, of a router whose codes are of unlike size."""
    config = tiny_run(folder, budget=BUDGET)
    space = read_space(tiny.unet())
    shape = RouterConfig(2, DIM, routing=routing, initial_logit=-3.0)  # type: ignore[arg-type]
    router = Router(space, shape, generator=torch.Generator().manual_seed(1))
    router.offsets.copy_(torch.tensor([-0.2, 0.4]))
    table = cost_table(tiny.unet(), space, latent_size=(8, 8), num_text_tokens=5)
    router.costs.copy_(table.ratio(router.harden(router.code_gates(router.codes))))
    assert router.costs[0] < BUDGET < router.costs[1]
    root = Path(config.root)
    router.save(root / "assigned" / "router")
    cut(replace(config, cut=replace(config.cut, baselines=())))
    shutil.copytree(root / "cut", root / "finetuned")
    return replace(config, refit=replace(config.refit, prompts=40, repeats=3, batch_size=7))


@pytest.mark.usefixtures("local_ray")
@torch.no_grad()
def test_the_need_head_is_fitted_to_what_the_experts_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_run(tmp_path, "need")
    summary = refit(config)
    router = refitted_router(config)
    assert router.need is not None
    rows = stage._sample(Store.open(config.root).join("encoded", "train"), 40, config.seed)
    assert 20 <= len(rows) <= 40
    assert len({row["key"] for row in rows}) == len(rows)
    z = torch.from_numpy(np.stack([row["embedding"] for row in rows]))
    routes = router.route_embeddings(z)
    assert float(router.costs[routes.indices].mean()) == pytest.approx(BUDGET, rel=0.03)
    assert summary["usage"] == pytest.approx(routes.usage().tolist(), abs=1e-6)

    # The first row's errors, computed here from the networks on disk and noise of another origin: alike on average.
    parts = load_pipeline_parts(config.model, config.storage)
    schedule, generator = NoiseSchedule(parts.scheduler), torch.Generator().manual_seed(0)
    texts = encode_texts(parts.tokenizer, parts.text_encoder, [row["caption"] for row in rows])
    latents = torch.from_numpy(np.stack([row["latents"] for row in rows])).float()
    errors = []
    for code in range(2):
        expert, found = load_expert(Path(config.root) / "finetuned" / f"{code:02d}"), []
        for _ in range(4):
            t = torch.randint(len(schedule), (len(rows),), generator=generator)
            noisy = schedule.noisy(latents, torch.randn(latents.shape, generator=generator), t)
            found.append((expert(noisy, t, texts).sample - parts.unet(noisy, t, texts).sample).square().mean())
        errors.append(float(torch.stack(found).mean()))
    predicted = (router.need(z) / router.need.loss_per_error).mean(0)
    assert predicted.tolist() == pytest.approx(errors, rel=0.25)

    monkeypatch.setattr(stage, "ROWS_PER_TASK", 9)
    assert refit(config)["measured losses"] == pytest.approx(summary["measured losses"], abs=1e-4)


@pytest.mark.usefixtures("local_ray")
def test_a_router_by_similarity_stays_as_it_is(tmp_path: Path) -> None:
    config = a_run(tmp_path, "similarity")
    assert refit(config)["routing"] == "similarity"
    before, after = (Router.load(Path(config.root) / name / "router") for name in ("assigned", "refitted"))
    torch.testing.assert_close(after.state_dict(), before.state_dict())
