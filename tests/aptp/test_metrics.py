# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import pytest
import torch
from diffusers import DDPMScheduler

from aptp.losses import NoiseSchedule
from aptp.metrics import (
    FeatureStatistics,
    Lite0,
    clip_score,
    frechet_distance,
    maximum_mean_discrepancy,
    paired_denoising_loss,
)
from tests.support import tiny


def rows(count: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_statistics_are_those_of_all_rows_in_any_parts():
    x = rows(100, 5, 0)
    parts = FeatureStatistics(5).update(x[:30]).update(x[30:31]).merge(FeatureStatistics(5).update(x[31:]))
    assert torch.allclose(parts.mean, x.mean(0))
    assert torch.allclose(parts.covariance, torch.cov(x.T))


def test_the_frechet_distance_of_a_set_to_itself_is_zero():
    x = FeatureStatistics(8).update(rows(200, 8, 0))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_has_the_gaussian_closed_form():
    """For commuting covariances: |m1 - m2|^2 + sum (sqrt l1 - sqrt l2)^2; y = 3 x + 2 gives 4 d + 4 sum l1 + ..."""
    x = rows(500, 4, 0)
    y = 3 * x + 2
    ours, theirs = FeatureStatistics(4).update(x), FeatureStatistics(4).update(y)
    variances = torch.linalg.eigvalsh(torch.cov(x.T))
    expected = (2 * x.mean(0) + 2).square().sum() + (2 * variances.sqrt()).square().sum()
    assert frechet_distance(ours, theirs) == pytest.approx(expected.item(), rel=1e-9)


def test_the_frechet_distance_agrees_with_scipys_matrix_root():
    from scipy.linalg import sqrtm

    x, y = rows(300, 6, 0) @ rows(6, 6, 7), rows(300, 6, 1, shift=0.5)
    s1, s2 = torch.cov(x.T), torch.cov(y.T)
    root = sqrtm((s1 @ s2).numpy()).real
    expected = (x.mean(0) - y.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * root.trace()
    ours = frechet_distance(FeatureStatistics(6).update(x), FeatureStatistics(6).update(y))
    assert ours == pytest.approx(expected.item(), rel=1e-6)


def test_fewer_rows_than_dimensions_are_no_trouble():
    ours, theirs = (FeatureStatistics(50).update(rows(10, 50, seed)) for seed in (0, 1))
    assert frechet_distance(ours, theirs) > 0
    with pytest.raises(ValueError, match="at least 2 rows"):
        _ = FeatureStatistics(3).update(rows(1, 3, 0)).covariance


def slow_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    def k(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(a / a.norm() - b / b.norm()).square().sum() / 200)

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    return float(1000 * (torch.stack(xx).mean() + torch.stack(yy).mean() - 2 * torch.stack(xy).mean()))


def test_mmd_agrees_with_the_slow_reference_and_is_unbiased():
    x, y = rows(12, 5, 0), rows(9, 5, 1, shift=1)
    assert maximum_mean_discrepancy(x, y) == pytest.approx(slow_mmd(x, y), rel=1e-6)
    same = [maximum_mean_discrepancy(rows(40, 5, 2 * s), rows(40, 5, 2 * s + 1)) for s in range(60)]
    assert abs(sum(same) / 60) < 0.1 < maximum_mean_discrepancy(rows(40, 5, 0), rows(40, 5, 1, shift=2))


def test_clip_score_is_a_hundred_for_parallel_features_and_zero_for_opposite_ones():
    x = rows(10, 5, 0)
    assert clip_score(x, 3 * x) == pytest.approx(100)
    assert clip_score(x, -x) == 0


def test_lite0_tells_pictures_apart_and_repeats_itself():
    lite0 = Lite0()
    grid = torch.linspace(-1, 1, 64)
    disc = (grid[:, None] ** 2 + grid**2 < 0.5).float() * 2 - 1
    stripes = torch.sign(torch.sin(20 * grid)).expand(64, 64)
    images = torch.stack([disc, torch.roll(disc, 3, 0), stripes])[:, None].expand(-1, 3, -1, -1)
    features = lite0(images)
    unit = torch.nn.functional.normalize(features, dim=1)
    assert features.shape == (3, 1280)
    assert torch.allclose(features[1:2], lite0(images[1:2]), atol=1e-4)
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.1


def test_the_paired_loss_is_each_samples_own():
    unet = tiny.unet()
    schedule = NoiseSchedule(DDPMScheduler(prediction_type="v_prediction"))
    x, texts = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 24)
    noise, t = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 900])
    together = paired_denoising_loss(unet, schedule, x, texts, noise, t)
    alone = [
        paired_denoising_loss(unet, schedule, x[i : i + 1], texts[i : i + 1], noise[i : i + 1], t[i : i + 1])
        for i in range(3)
    ]
    assert together.shape == (3,)
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4)
