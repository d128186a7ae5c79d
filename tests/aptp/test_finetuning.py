# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import pytest
import torch
from diffusers import DDPMScheduler

from aptp.codes import ArchitectureCode
from aptp.finetuning import FinetuningStage
from aptp.latents import Batch
from aptp.noise import Noise
from aptp.objectives import FinetuningConfig
from aptp.sites import read_space
from aptp.slicing import slice_unet
from tests.support import tiny
from tests.support.one_device import OnMeta

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
NULL = torch.full((5, 24), 7.0)


def a_batch(count: int = 4) -> Batch:
    noise = torch.Generator().manual_seed(0)
    shapes = ((count, 4, 8, 8), (count, 5, 24), (count, 16))
    latents, texts, embeddings = (torch.randn(shape, generator=noise) for shape in shapes)
    return Batch(latents, texts, embeddings, torch.arange(count))


def a_stage(config: FinetuningConfig | None = None, keep_every: int = 2) -> FinetuningStage:
    teacher = tiny.unet()
    space = read_space(teacher)
    bits = torch.ones(len(space), dtype=torch.bool)
    for site in space.width:
        entries = space.slice_of(site.name)
        bits[entries] = torch.arange(site.units) % keep_every == 0
    expert = slice_unet(teacher, ArchitectureCode(space, bits))
    return FinetuningStage(expert, teacher, SCHEDULER, config or FinetuningConfig(), null_states=NULL)


def run(stage: FinetuningStage, step: int = 0):
    batch = a_batch()
    return stage(batch, noise=Noise(0, step, batch.rows))


def test_an_expert_that_lost_nothing_is_its_teacher():
    loss = run(a_stage(keep_every=1))
    assert loss.terms["output"].item() < 1e-9
    assert loss.terms["feature"].item() < 1e-9
    assert loss.terms["denoising"] > 0.1


def test_training_brings_the_expert_nearer_to_its_teacher_and_leaves_the_teacher_alone():
    stage = a_stage()
    before = {name: value.clone() for name, value in stage.teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(stage.expert.parameters(), lr=1e-3)
    first = run(stage).scalars()
    for _ in range(15):
        optimizer.zero_grad()
        run(stage).total.backward()
        optimizer.step()
    last = run(stage).scalars()
    assert last["output"] < first["output"] / 2
    assert last["feature"] < first["feature"]
    assert all(torch.equal(value, before[name]) for name, value in stage.teacher.state_dict().items())


def test_a_step_leaves_its_device_for_nothing():
    stage = a_stage().to("meta")
    batch = a_batch().to("meta")
    with OnMeta():
        stage(batch, noise=Noise(0, 1, batch.rows)).total.backward()
    assert all(parameter.grad is not None for parameter in stage.expert.parameters())


def test_the_null_share_of_captions_is_dropped():
    stage = a_stage(FinetuningConfig(null_share=0.25))
    texts = torch.zeros(4000, 5, 24)
    noise = Noise(0, 0, torch.arange(4000))
    dropped = stage._drop(texts, noise)
    assert (dropped == 7).flatten(1).all(1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert ((dropped == 7) | (dropped == 0)).all()
    none = a_stage(FinetuningConfig(null_share=0.0))
    assert torch.equal(none._drop(texts, noise), texts)


def test_the_learned_state_is_the_expert():
    stage, other = a_stage(), a_stage()
    for parameter in stage.expert.parameters():
        parameter.data *= 1.01
    other.load_learned_state(stage.learned_state())
    assert run(other).scalars() == run(stage).scalars()


def test_a_term_without_weight_is_not_computed():
    loss = run(a_stage(FinetuningConfig(feature_weight=0.0)))
    assert set(loss.terms) == {"denoising", "output"}


def test_what_is_missing_is_named():
    unet = tiny.unet()
    with pytest.raises(ValueError, match="so null_states is needed"):
        FinetuningStage(tiny.unet(), unet, SCHEDULER, FinetuningConfig())
    with pytest.raises(ValueError, match="are the same module"):
        FinetuningStage(unet, unet, SCHEDULER, FinetuningConfig(), null_states=NULL)
