# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from aptp.need import NeedConfig, NeedHead, NeedMemory, Observations, fit_need

DIM, CODES = 6, 3
EXACT = NeedConfig(length=2.0, noise=1e-3, memory=2000, enough=1)


def truth(z: torch.Tensor) -> torch.Tensor:
    """A known log error of every prompt under every code: a part that all share, and a part of each code's own."""
    own = torch.stack([0.3 * torch.sin(2 * z[:, 1] + k) for k in range(CODES)], 1)
    return torch.sin(z[:, :1]) + own - torch.arange(CODES)


def prompts(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def observed(count: int, *, noise: float = 0.0, seed: int = 0) -> Observations:
    generator = torch.Generator().manual_seed(seed + 100)
    z, codes = prompts(count, seed), torch.randint(CODES, (count,), generator=generator)
    times = torch.rand(count, generator=generator)
    log_errors = truth(z)[torch.arange(count), codes] + 2 * (times * 10).floor() / 10
    return Observations(z, codes, times, (log_errors + noise * torch.randn(count, generator=generator)).exp())


def mean_over_time(log_errors: torch.Tensor) -> torch.Tensor:
    return log_errors.exp() * float(torch.exp(2 * torch.arange(10) / 10).mean())


def test_a_known_function_of_the_embedding_is_learned_exactly():
    head = NeedHead(CODES, DIM, EXACT).observe(observed(2000))
    expected = mean_over_time(truth(prompts(200, seed=9)))
    relative = (head(prompts(200, seed=9)) / expected).log().abs()
    assert relative.mean() < 0.12  # of a range of e^2; what is left is the profile's own estimate
    assert (head(prompts(200, seed=9)).argmin(1) == expected.argmin(1)).all()


def test_noise_is_averaged_out_and_the_mean_is_met():
    """Log errors with a standard deviation of 1, half as much again as the signal's own."""
    head = NeedHead(CODES, DIM, NeedConfig(length=1.5)).observe(observed(1500, noise=1.0))
    z = prompts(400, seed=9)
    for code in range(CODES):
        assert spearmanr(head(z)[:, code], truth(z)[:, code])[0] > 0.8
    ratio = head(z).mean(0) / (mean_over_time(truth(z)).mean(0) * np.exp(0.5))  # the mean of exp(noise)
    assert ratio.log().abs().max() < 0.3


def test_the_posterior_mean_is_kernel_regression_in_float64():
    seen, config = observed(60, noise=0.3), NeedConfig(length=0.9, shared=0.6, noise=0.5)
    head = NeedHead(CODES, DIM, config).observe(seen)
    z, x = seen.embeddings.double().numpy(), prompts(5, seed=9).double().numpy()
    scale = np.sqrt(((z - z.mean(0)) ** 2).sum(1).mean()) * 0.9

    def covariance(a, code_a, b, code_b):
        distance = ((a[:, None] - b[None]) ** 2).sum(2) / scale**2
        return np.exp(-distance / 2) * np.where(code_a[:, None] == code_b[None], 1.0, 0.6)

    codes = seen.codes.numpy()
    interval = (seen.times * 10).long()
    prior = NeedHead(CODES, DIM, config)
    prior._set_levels(seen.errors.log(), seen.codes, interval)
    rest = (seen.errors.log() - prior.levels[seen.codes] - prior.profile[seen.codes, interval]).double().numpy()
    solved = np.linalg.solve(covariance(z, codes, z, codes) + 0.5 * np.eye(60), rest)
    for code in range(CODES):
        expected = covariance(x, np.full(5, code), z, codes) @ solved
        found = head._log_errors(prompts(5, seed=9))[:, code] - head.levels[code]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_measuring_every_code_gives_what_single_observations_give():
    """The Kronecker solution against the general one on the same 40 x 3 measurements."""
    z, times = prompts(40), torch.full((40, 1), 0.05)
    errors = truth(z).exp()[:, None]
    complete = fit_need(z, times, errors, errors, EXACT)
    flat = Observations(
        z.repeat_interleave(CODES, 0), torch.arange(CODES).repeat(40), times.flatten().repeat_interleave(CODES),
        errors.flatten(),
    )  # fmt: skip
    single = NeedHead(CODES, DIM, EXACT).observe(flat)
    z = prompts(50, seed=9)
    assert torch.allclose(complete(z).log(), single(z).log(), atol=2e-3)


def test_losses_scale_errors_where_they_are_positive():
    z, times, errors = prompts(40), torch.full((40, 2), 0.5), torch.rand(40, 2, CODES) + 0.5
    half, none = (fit_need(z, times, errors, factor * errors, EXACT) for factor in (0.5, -1.0))
    assert torch.allclose(half(z), 0.5 * none(z))
    assert half(z).mean() == pytest.approx(0.5 * float(errors.mean()), rel=0.02)


def test_a_prediction_does_not_depend_on_the_batch_or_on_the_order_of_observations():
    seen = observed(300, noise=0.5)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shuffled = Observations(seen.embeddings[order], seen.codes[order], seen.times[order], seen.errors[order])
    head, other = (NeedHead(CODES, DIM, NeedConfig()).observe(each) for each in (seen, shuffled))
    z = prompts(20, seed=9)
    assert torch.allclose(head(z), torch.cat([head(row[None]) for row in z]), rtol=1e-6)
    assert torch.allclose(head(z), other(z), rtol=1e-4)


def test_memory_keeps_the_newest_observations_and_tensors_keep_their_shapes():
    memory, head = NeedMemory(DIM, 50), NeedHead(CODES, DIM, NeedConfig(memory=50, enough=1))
    head.reserve(50)
    seen = observed(70)
    for start in range(0, 70, 7):
        memory.add(Observations(*(getattr(seen, name)[start : start + 7] for name in vars(seen))))
    assert sorted(memory.observations().errors.tolist()) == sorted(seen.errors[20:].tolist())
    shapes = {name: value.shape for name, value in head.state_dict().items()}
    head.observe(observed(12))
    assert {name: value.shape for name, value in head.state_dict().items()} == shapes
    few = NeedHead(CODES, DIM, NeedConfig()).observe(observed(12))
    assert torch.allclose(head(prompts(5, seed=9)), few(prompts(5, seed=9)))


def test_a_head_without_some_codes_says_the_same_of_the_others():
    head = NeedHead(CODES, DIM, NeedConfig()).observe(observed(100))
    z = prompts(10, seed=9)
    assert torch.equal(head.keeping([2, 0])(z), head(z)[:, [2, 0]])


@pytest.mark.parametrize("damage", ["embeddings", "errors"])
def test_what_is_not_finite_is_refused(damage):
    seen = observed(10)
    getattr(seen, damage)[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        NeedHead(CODES, DIM, NeedConfig()).observe(seen)
    with pytest.raises(ValueError, match="6-d ones"):
        NeedHead(CODES, DIM, NeedConfig()).observe(observed(10))(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="at most memory"):
        NeedConfig(memory=10, enough=20)
