# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from aptp.losses import (
    LossTerms,
    NoiseSchedule,
    contrastive_loss,
    denoising_loss,
    feature_loss,
    pull_loss,
    resource_loss,
    spread,
)
from aptp.noise import Noise, sample_noise


def scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_forward_process_is_diffusers(prediction_type):
    ddpm = scheduler(prediction_type)
    schedule = NoiseSchedule(ddpm)
    x = torch.randn(6, 4, 8, 8)
    noise, t = sample_noise(x, len(schedule), Noise(0, 0, torch.arange(len(x))))
    targets = {"epsilon": noise, "v_prediction": ddpm.get_velocity(x, noise, t), "sample": x}
    assert torch.allclose(schedule.noisy(x, noise, t), ddpm.add_noise(x, noise, t), atol=1e-6)
    assert torch.allclose(schedule.target(x, noise, t), targets[prediction_type], atol=1e-6)


def test_min_snr_weights_make_every_parametrisation_weigh_the_same_error_alike():
    """An error d in x is d * a/s in epsilon and d/s in v; so w_x = w_eps snr, and for v the weight never falls to 0."""
    t = torch.tensor([0, 100, 500, 999])
    weight = {
        kind: NoiseSchedule(scheduler(kind)).min_snr_weight(t, 5.0) for kind in ("epsilon", "sample", "v_prediction")
    }
    a2 = scheduler("epsilon").alphas_cumprod[t]
    snr = a2 / (1 - a2)
    assert torch.allclose(weight["sample"], weight["epsilon"] * snr, rtol=1e-4)
    assert weight["v_prediction"].tolist() == pytest.approx([min(s + 1, 5) / (s + 1) for s in snr.tolist()])
    assert weight["v_prediction"][-1] == 1


def test_an_unknown_prediction_type_is_refused():
    ddpm = scheduler("epsilon")
    ddpm.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        NoiseSchedule(ddpm)


def test_denoising_loss_weighs_rows():
    prediction = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    loss = denoising_loss(prediction, torch.zeros_like(prediction), torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx((1 + 0.5 * 4) / 2)


def test_normalised_features_weigh_a_layer_alike_at_any_scale():
    teacher = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    student = [layer + 0.1 * torch.randn_like(layer) for layer in teacher]
    scaled = feature_loss([100 * student[0], student[1]], [100 * teacher[0], teacher[1]])
    assert scaled.item() == pytest.approx(feature_loss(student, teacher).item(), rel=1e-5)
    plain = feature_loss(student, teacher, normalise=False)
    errors = [(s - t).square().mean().item() for s, t in zip(student, teacher, strict=True)]
    assert plain.item() == pytest.approx(sum(errors) / 2)
    with pytest.raises(ValueError, match="same layers"):
        feature_loss(student[:1], teacher)


def test_the_resource_loss_is_zero_at_the_budget_and_symmetric_in_the_log():
    assert resource_loss(torch.tensor(0.6), 0.6).item() == pytest.approx(0, abs=1e-6)
    assert resource_loss(torch.tensor(0.3), 0.6).item() == pytest.approx(math.log(2))
    assert resource_loss(torch.tensor(0.9), 0.45).item() == pytest.approx(math.log(2))


def test_spread_is_the_standard_deviation_over_prompts_and_has_a_finite_gradient_at_zero():
    ratios, usage = torch.tensor([0.4, 0.8]), torch.tensor([0.75, 0.25])
    over_prompts = torch.tensor([0.4, 0.4, 0.4, 0.8]).std(correction=0)
    assert spread(ratios, usage).item() == pytest.approx(over_prompts.item(), abs=1e-4)
    equal = torch.full((3,), 0.5, requires_grad=True)
    spread(equal, torch.ones(3)).backward()
    assert torch.isfinite(equal.grad).all()


def groups(count: int, clusters: int = 4) -> torch.Tensor:
    """Prompts of a few clusters, as embeddings."""
    noise = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, 32, generator=noise)
    return centres[torch.arange(count) % clusters] + 0.5 * torch.randn(count, 32, generator=noise)


def test_the_row_form_does_not_depend_on_the_number_of_prompts_and_the_official_form_does():
    def values(form):
        return [contrastive_loss(groups(n), torch.ones(n, 6), form=form).item() for n in (64, 256)]

    row, bce = values("row"), values("bce")
    assert row[1] == pytest.approx(row[0], rel=0.25)
    assert bce[1] < bce[0] / 2.5


def test_both_forms_are_their_formulas_word_by_word():
    z, phi = groups(6).double(), torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).double()

    def row(vectors: torch.Tensor, i: int, without_self: bool) -> torch.Tensor:
        others = [j for j in range(6) if j != i or not without_self]
        cosines = [torch.cosine_similarity(vectors[i], vectors[j], dim=0) for j in others]
        return torch.softmax(torch.stack(cosines) / 0.5, dim=0)

    kl, bce = 0.0, 0.0
    for i in range(6):
        for p, s in zip(row(z, i, True), row(phi, i, True), strict=True):
            kl += float(p * (p / s).log()) / 6 / math.log(5)
        for p, s in zip(row(z, i, False), row(phi, i, False), strict=True):
            bce -= float(p * s.log() + (1 - p) * (1 - s).log()) / 36
    assert contrastive_loss(z, phi, temperature=0.5, form="row").item() == pytest.approx(kl, rel=1e-4)
    assert contrastive_loss(z, phi, temperature=0.5, form="bce").item() == pytest.approx(bce, rel=1e-4)


@pytest.mark.parametrize("form", ["row", "bce"])
def test_architectures_like_their_prompts_cost_less_than_equal_ones(form):
    z = groups(32)
    like = contrastive_loss(z, z, form=form)
    equal = contrastive_loss(z, torch.ones(32, 6), form=form)
    assert like < equal / 2
    if form == "row":
        assert like.item() == pytest.approx(0, abs=1e-5)


def test_the_contrastive_gradient_brings_prompts_of_a_cluster_together():
    z = groups(16)
    features = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        contrastive_loss(z, features).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(features.detach(), dim=1)
    same = torch.arange(16)[:, None] % 4 == torch.arange(16) % 4
    assert (unit @ unit.T)[same].mean() > (unit @ unit.T)[~same].mean() + 0.2


def test_few_prompts_and_equal_features_are_finite():
    for count in (1, 2, 3):
        features = torch.ones(count, 4, requires_grad=True)
        contrastive_loss(torch.randn(count, 8), features).backward()
        assert torch.isfinite(features.grad).all()


def test_pull_is_one_for_indifferent_prompts_and_lower_when_they_agree():
    assigned = torch.tensor([0, 1, 2, 0])
    assert pull_loss(torch.zeros(4, 3), assigned).item() == pytest.approx(1)
    assert pull_loss(torch.eye(3)[assigned], assigned) < 0.01
    assert pull_loss(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)).item() == 0


def test_the_total_is_the_weighted_sum():
    terms = LossTerms({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, {"b": 0.5}, {"ratio": torch.tensor(0.7)})
    assert terms.total.item() == pytest.approx(3.5)
    assert terms.scalars() == pytest.approx({"a": 2.0, "b": 3.0, "total": 3.5, "ratio": 0.7})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has no alphas_cumprod"),
        (EDMEulerScheduler(), "EDMEulerScheduler has no alphas_cumprod"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "DPMSolverMultistepScheduler has no alphas_cumprod"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "DDIMScheduler ends in noise without signal"),
        (EulerDiscreteScheduler(rescale_betas_zero_snr=True), "EulerDiscreteScheduler ends in noise without signal"),
    ],
)
def test_a_scheduler_whose_noise_or_prediction_cannot_be_used_is_refused(made, message):
    with pytest.raises(ValueError, match=f"^the scheduler {message}"):
        NoiseSchedule(made)
    assert len(NoiseSchedule(DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))) == 1000
