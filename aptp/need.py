"""What a prompt needs: what each code costs it, measured in training, predicted from the prompt's embedding.

    d_bk = |student_k(x_t) - teacher(x_t)|^2 / pixels          at one image, noise and timestep: the distillation error
    log d_bk = a_k + p_k(t_b) + g_k(z_b) + noise               g: a Gaussian process with mean zero
    cov(g_k(z), g_l(z')) = c(z, z') (s + (1 - s) [k = l])      c: squared exponential; s: the share common to all codes

The teacher answers almost as the data would on average, so the mean of d is close to the denoising loss that the code
adds, and d is far less noisy than that difference: the noise of the target is in neither answer.

The posterior mean is kernel regression on the prompts that were measured (Rasmussen and Williams 2006, chapter 2; the
covariance over codes is the intrinsic coregionalisation of Bonilla et al. 2007). It is solved, not descended: there is
no learning rate, and the result does not depend on the order of the observations or on who made them. A code with few
observations is judged by what is common to all codes, an unfamiliar prompt by the mean of its code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

_INTERVALS: Final = 10  # of the timesteps, each with an error level of its own
_LEAST: Final = 1e-3  # of the mean error, before an error's logarithm: what is lost there is nothing
_PRIOR: Final = 20.0  # pseudo-observations that hold one code's level and profile at those of all codes


@dataclass(frozen=True)
class NeedConfig:
    """The regression's prior.

    length: of the kernel, in units of the embeddings' root mean square distance to their mean.
    shared: s, the share of the variance that all codes have in common.
    noise: variance of one observation, in units of the variance of g.
    memory: observations that training keeps, the newest; solving for n of them takes n^3 / 3 multiply-adds.
    enough: observations before which training does not route by what is predicted.
    recent: observations, counted back, over which a code's level fades while codes are trained.
    """

    length: float = 0.7
    shared: float = 0.8
    noise: float = 1.0
    memory: int = 1536
    enough: int = 256
    recent: float = 128.0

    def __post_init__(self) -> None:
        for name in ("length", "noise", "recent"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, it is {getattr(self, name)}")
        if not 0 <= self.shared <= 1:
            raise ValueError(f"shared must be a share in [0, 1], it is {self.shared}")
        if not 1 <= self.enough <= self.memory:
            raise ValueError(
                f"enough must be at least 1 observation and at most memory, they are {self.enough} and {self.memory}"
            )


@dataclass(frozen=True)
class Observations:
    """Measured errors, one per row: of which prompt, under which code, at which time t / number of timesteps."""

    embeddings: Float[Tensor, "row dim"]
    codes: Int[Tensor, " row"]
    times: Float[Tensor, " row"]
    errors: Float[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.errors)


class NeedMemory(nn.Module):
    """The newest observations of a training run, as buffers that a checkpoint holds."""

    count: Tensor
    embeddings: Tensor
    codes: Tensor
    times: Tensor
    errors: Tensor

    def __init__(self, embedding_dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("embeddings", torch.zeros(size, embedding_dim))
        self.register_buffer("codes", torch.zeros(size, dtype=torch.long))
        self.register_buffer("times", torch.zeros(size))
        self.register_buffer("errors", torch.zeros(size))

    def add(self, seen: Observations) -> None:
        """Takes the place of the oldest."""
        size = len(self.errors)
        rows = (self.count + torch.arange(len(seen), device=self.count.device))[-size:] % size
        for name in ("embeddings", "codes", "times", "errors"):
            buffer, values = getattr(self, name), getattr(seen, name)[-size:]
            buffer.index_copy_(0, rows, values.to(buffer.dtype))
        self.count += len(seen)

    def observations(self) -> Observations:
        """The oldest first."""
        count, size = int(self.count), len(self.errors)
        order = torch.arange(max(0, count - size), count, device=self.count.device) % size
        return Observations(*(getattr(self, name)[order] for name in ("embeddings", "codes", "times", "errors")))


class NeedHead(nn.Module):
    """Predicts every prompt's loss under every code. All of it is buffers: it is solved for, never differentiated.

    `anchors` are the prompts that were measured and `weights` the solution: g_k(z) = sum_j c(z, anchor_j) weights_jk.
    A head without anchors predicts the same for every prompt.
    """

    centre: Tensor
    scale: Tensor
    anchors: Tensor
    weights: Tensor
    levels: Tensor
    profile: Tensor
    loss_per_error: Tensor

    def __init__(self, num_codes: int, embedding_dim: int, config: NeedConfig, *, num_anchors: int = 0) -> None:
        super().__init__()
        self.num_codes, self.config = num_codes, config
        self.register_buffer("centre", torch.zeros(embedding_dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("anchors", torch.zeros(num_anchors, embedding_dim))
        self.register_buffer("weights", torch.zeros(num_anchors, num_codes))
        self.register_buffer("levels", torch.zeros(num_codes))
        self.register_buffer("profile", torch.zeros(num_codes, _INTERVALS))
        self.register_buffer("loss_per_error", torch.ones(()))

    @torch.no_grad()
    def forward(self, embeddings: Float[Tensor, "row dim"]) -> Float[Tensor, "row code"]:
        """The denoising loss that each code is expected to add for each prompt, the mean over all timesteps."""
        over_time = self.profile.float().logsumexp(1) - log(_INTERVALS)
        return (self._log_errors(embeddings.float()) + over_time).exp() * self.loss_per_error.float()

    @torch.no_grad()
    def observe(
        self, seen: Observations, embeddings: Float[Tensor, "prompt dim"] | None = None, *, drifting: bool = False
    ) -> "NeedHead":
        """Solves the regression for these observations and forgets all others; returns itself.

        embeddings: of many prompts, whose centre and spread set the kernel's scale; unset: those that were observed.
        drifting: they were made one after the other while the codes changed, the oldest first. What a code's errors are
            on average is then a moving mean, and the newest say what it is now.

        Raises:
            ValueError: there is no observation, or one is not finite.
        """
        z, codes, errors = seen.embeddings.float(), seen.codes, seen.errors.float()
        if not len(seen) or not torch.isfinite(errors).all() or not torch.isfinite(z).all():
            raise ValueError(
                f"need is learned from at least one observation, all finite; of {len(seen)} observations "
                f"{int((~torch.isfinite(errors)).sum())} have errors and {int((~torch.isfinite(z)).any(1).sum())} have "
                "embeddings that are not finite: the network or its inputs have diverged"
            )
        self._set_scale(z if embeddings is None else embeddings.float())
        log_errors, intervals = _log(errors), _intervals(seen.times)
        member = one_hot(codes, self.num_codes).to(z)
        moved = self._drift(log_errors, member) if drifting else torch.zeros_like(log_errors)
        self._set_levels(log_errors - moved, codes, intervals)
        rest = log_errors - moved - self.levels[codes] - self.profile[codes, intervals]

        shared = self.config.shared
        covariance = self._kernel(z, z) * (shared + (1 - shared) * (member @ member.T))
        solved = _solve(covariance.double(), rest.double()[:, None], self.config.noise).to(z)
        self._set_anchors(z, solved * (shared + (1 - shared) * member))

        now = (errors * torch.exp(-moved))[:, None].expand(-1, self.num_codes)
        self._meet(now, self._log_errors(z), intervals, member)
        return self

    @torch.no_grad()
    def level_by_cost(
        self, costs: Float[Tensor, " code"], counts: Float[Tensor, " code"], expected_fall: float
    ) -> None:
        """Puts what codes lose on average on a straight line of its logarithm over their costs.

        For codes that share one set of weights: there size is all that they differ in, and a code that happened to be
        trained more would otherwise look better, be used more, and be trained more still.

        Args:
            counts: observations of each code. expected_fall: of the logarithm for a unit of cost, which is believed
                where codes are of nearly one size.
        """
        levels = self.levels + self.profile.logsumexp(1) - log(_INTERVALS)
        share = (counts + 1) / (counts + 1).sum()
        apart, mean = costs - (share * costs).sum(), (share * levels).sum()
        seen, held = counts.sum() * (share * apart.square()).sum(), _PRIOR * (0.1 * costs.mean()).square()
        fall = (held * expected_fall - counts.sum() * (share * apart * levels).sum()) / (held + seen)
        self.levels = self.levels + mean - fall.clamp_min(expected_fall / 10) * apart - levels

    def _drift(self, log_errors: Float[Tensor, " row"], member: Float[Tensor, "row code"]) -> Float[Tensor, " row"]:
        """How far above its level of now a code's level was when each observation was made."""
        made = torch.arange(len(log_errors), device=log_errors.device).to(log_errors) / self.config.recent
        near = torch.exp(-(made[:, None] - made[None]).abs())
        prior = (near @ log_errors + _PRIOR * log_errors.mean()) / (near.sum(1) + _PRIOR)
        weight, total = near @ member, near @ (member * log_errors[:, None])
        levels = (total + _PRIOR * prior[:, None]) / (weight + _PRIOR)  # (row, code): each code's at that time
        return ((levels - levels[-1]) * member).sum(1)

    def _meet(
        self,
        errors: Float[Tensor, "row code"],
        log_errors: Float[Tensor, "row code"],
        intervals: Int[Tensor, " row"],
        member: Float[Tensor, "row code"],
    ) -> None:
        """The mean of exp(noise) is above one: each code's level is raised until its errors are met on average."""
        profile = self.profile[:, intervals].T
        predicted, measured = (((log_errors + profile).exp() * member).sum(0), (errors * member).sum(0))
        met = (measured / predicted).nan_to_num(1.0).clamp(0.1, 10)
        self.levels = self.levels + torch.where(member.sum(0) > 0, met, 1).log()

    def _log_errors(self, z: Float[Tensor, "row dim"]) -> Float[Tensor, "row code"]:
        if z.shape[1] != len(self.centre):
            raise ValueError(f"embeddings are {z.shape[1]}-d, this head was made for {len(self.centre)}-d ones")
        return self.levels.float() + self._kernel(z, self.anchors.float()) @ self.weights.float()

    def _kernel(self, a: Float[Tensor, "a dim"], b: Float[Tensor, "b dim"]) -> Float[Tensor, "a b"]:
        a, b = ((z - self.centre.float()) / (self.scale.float() * self.config.length) for z in (a, b))
        # Without the matrix product's rounding a row's answer would not depend on who shares its batch.
        distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.exp(-distances.square() / 2)

    def reserve(self, rows: int) -> None:
        """Room for this many anchors, so that a training's checkpoints hold tensors of one shape."""
        self._set_anchors(self.anchors, self.weights, rows)

    def _set_anchors(self, z: Float[Tensor, "row dim"], weights: Float[Tensor, "row code"], room: int = 0) -> None:
        spare = max(0, room - len(z), len(self.anchors) - len(z))
        self.anchors = torch.cat([z, z.new_zeros(spare, z.shape[1])])
        self.weights = torch.cat([weights, weights.new_zeros(spare, self.num_codes)])

    def _set_scale(self, z: Float[Tensor, "row dim"]) -> None:
        self.centre = z.mean(0)
        spread = (z - self.centre).square().sum(1).mean().sqrt()
        self.scale = torch.where(spread > 0, spread, torch.ones_like(spread))

    def _set_levels(
        self, log_errors: Float[Tensor, " row"], codes: Int[Tensor, " row"], intervals: Int[Tensor, " row"]
    ) -> None:
        """a_k, and p_k around it: means of the observations, drawn to those of all codes where there are few."""
        code, interval = one_hot(codes, self.num_codes).to(log_errors), one_hot(intervals, _INTERVALS).to(log_errors)
        common = _mean(log_errors, interval, log_errors.mean())
        rest = log_errors - common[intervals]
        levels = _mean(rest, code, rest.mean())
        rest = rest - levels[codes]
        joint = (code[:, :, None] * interval[:, None, :]).flatten(1)
        self.levels = levels
        self.profile = common + _mean(rest, joint, rest.new_zeros(())).view(self.num_codes, _INTERVALS)

    @torch.no_grad()
    def keeping(self, codes: Sequence[int]) -> "NeedHead":
        """A head of only these of its codes, in this order."""
        kept = NeedHead(len(codes), len(self.centre), self.config, num_anchors=len(self.anchors))
        rows = {name: getattr(self, name)[list(codes)] for name in ("levels", "profile")}
        kept.load_state_dict({**self.state_dict(), **rows, "weights": self.weights[:, list(codes)]})
        return kept.to(self.centre.device)


def _log(errors: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    least = (_LEAST * errors.mean()).clamp_min(torch.finfo(errors.dtype).tiny)
    return errors.clamp_min(least).log()


def _intervals(times: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    return (times * _INTERVALS).long().clamp(0, _INTERVALS - 1)


def _mean(
    values: Float[Tensor, " row"], member: Float[Tensor, "row group"], prior: Float[Tensor, ""]
) -> Float[Tensor, " group"]:
    return (member.T @ values + _PRIOR * prior) / (member.sum(0) + _PRIOR)


def _solve(
    covariance: Float64[Tensor, "row row"], values: Float64[Tensor, "row column"], noise: float
) -> Float64[Tensor, "row column"]:
    diagonal = noise * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.cholesky_solve(values, torch.linalg.cholesky(covariance + diagonal))


@torch.no_grad()
def fit_need(
    embeddings: Float[Tensor, "prompt dim"],
    times: Float[Tensor, "prompt time"],
    errors: Float[Tensor, "prompt time code"],
    losses: Float[Tensor, "prompt time code"],
    config: NeedConfig,
) -> NeedHead:
    """The head of networks as they are now: every prompt was measured under every code, at the same noise.

    losses: the denoising loss that each code adds to the teacher's, at the same noise. The mean loss over the mean
        error, of all codes together since losses are noisy, becomes `loss_per_error`. Where that is not positive,
        predictions stay errors.
    """
    prompts, repeats, codes = errors.shape
    if not all(torch.isfinite(values).all() for values in (embeddings, errors, losses)):
        raise ValueError("what was measured must be finite; an embedding, an error or a loss is NaN or infinite")
    z = embeddings.float()
    head = NeedHead(codes, z.shape[1], config).to(z.device)
    head._set_scale(z)
    log_errors = _log(errors.float()).flatten()
    code = torch.arange(codes, device=z.device).repeat(prompts * repeats)
    interval = _intervals(times.flatten()).repeat_interleave(codes)
    head._set_levels(log_errors, code, interval)
    rest = log_errors - head.levels[code] - head.profile[code, interval]

    # All codes of all prompts: the covariance is a Kronecker product, whose second factor, shared + (1 - shared) I, has
    # two eigenvalues, one for the mean over codes and one for what differs from it.
    y = rest.view(prompts, repeats, codes).mean(1).double()
    covariance = head._kernel(z, z).double()
    mean, own = y.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    own_share = 1 - config.shared
    both = config.shared * codes + own_share
    weights = both * _solve(both * covariance, mean, config.noise / repeats)
    if codes > 1 and own_share > 0:
        weights = weights + own_share * _solve(own_share * covariance, own, config.noise / repeats)
    head.anchors, head.weights = z.clone(), weights.float().expand(prompts, codes).contiguous()

    measured = errors.float().flatten(0, 1)
    every = torch.ones_like(measured)
    head._meet(measured, head._log_errors(z).repeat_interleave(repeats, 0), _intervals(times.flatten()), every)
    lost, cost = losses.float().mean(), measured.mean()
    head.loss_per_error = torch.where((lost > 0) & (cost > 0), lost / cost, torch.ones_like(lost))
    return head
