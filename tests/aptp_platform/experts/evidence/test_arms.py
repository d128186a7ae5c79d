"""Each arm on losses made up so that the right answer is known."""

import numpy as np
import pytest

from aptp_platform.experts.evidence.arms import (
    ORACLE,
    RANDOM,
    ROUTED,
    TEACHER,
    Network,
    arm_facts,
    build_arms,
    kind_facts,
    need_capacity,
    need_of,
    routed_minus,
)

COSTS = np.array([0.3, 0.5])
ROWS = 200


def network(losses: np.ndarray, cost: float, milliseconds: float = 1.0) -> Network:
    return Network(np.atleast_2d(losses), np.full(losses.shape[-1], cost), cost, milliseconds)


def networks(losses: np.ndarray, costs: np.ndarray = COSTS) -> list[Network]:
    return [network(each, cost, 100 * cost) for each, cost in zip(losses, costs, strict=True)]


def made_up(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Teacher's losses; two experts' at two noises, where the larger one helps odd rows only; codes that know it."""
    rng = np.random.default_rng(seed)
    teacher = rng.uniform(0.2, 0.4, ROWS)
    odd = np.arange(ROWS) % 2
    extra = np.stack([0.1 + 0.2 * odd, np.full(ROWS, 0.1)])[:, None] + rng.normal(0, 0.01, (2, 2, ROWS))
    return teacher, teacher + extra, odd


def test_routed_random_and_oracle_by_hand() -> None:
    teacher, experts, codes = made_up()
    arms = build_arms(network(teacher, 1.0), networks(experts), codes, {"uniform": network(teacher + 0.25, 0.4)})
    rows = np.arange(ROWS)
    assert arms[ROUTED].losses == pytest.approx(experts[codes, 0, rows])
    assert arms[RANDOM].losses == pytest.approx(experts[:, 0].mean(0))
    assert [arms[name].costs.mean() for name in (TEACHER, ROUTED, RANDOM, "uniform")] == pytest.approx(
        [1, 0.4, 0.4, 0.4]
    )
    assert arms[ORACLE].costs.mean() <= 0.4 + 1e-9
    facts = arm_facts(arms)
    assert facts[ROUTED]["extra_loss"] == pytest.approx(0.1, abs=0.005)
    assert facts[RANDOM]["extra_loss"] == pytest.approx(0.15, abs=0.005)
    assert facts[ORACLE]["extra_loss"] == pytest.approx(0.1, abs=0.005)
    low, high = facts["uniform"]["extra_loss_95"]
    assert low - 1e-9 <= 0.25 <= high + 1e-9
    assert facts[ROUTED]["ms"] == pytest.approx(40), "each expert's, weighted by its use"
    assert facts[RANDOM]["teacher_distance"] == pytest.approx(0.4)
    difference = routed_minus(arms)
    assert set(difference) == {RANDOM, ORACLE, "uniform"}
    assert difference["uniform"]["95"][1] < 0


def test_the_oracle_does_not_see_the_noise_that_it_is_scored_at() -> None:
    """Experts that differ in noise alone: choosing by the other noise gains nothing, by the same it would."""
    rng = np.random.default_rng(1)
    teacher = np.zeros(2000)
    experts = rng.normal(0, 1, (2, 2, 2000))
    arms = build_arms(network(teacher, 1.0), networks(experts, np.array([0.4, 0.4])), np.zeros(2000, int), {})
    assert abs(arms[ORACLE].losses.mean()) < 0.1
    assert experts[:, 0].min(0).mean() < -0.4


def test_need_and_capacity_are_compared_by_rank() -> None:
    losses, expert_losses, codes = made_up()
    teacher, experts = network(losses, 1.0), networks(expert_losses)
    assert need_of(teacher, experts) == pytest.approx(expert_losses[:, 0].mean(0) - losses)
    found = need_capacity(teacher, experts, COSTS[codes], None)
    assert found["spearman"] > 0.8
    assert found["95"][0] > 0.7
    assert need_capacity(teacher, experts, np.full(ROWS, 0.4), None)["spearman"] is None
    measured = (expert_losses[:, 0] - losses).T
    told = need_capacity(teacher, experts, COSTS[codes], measured)["predicted"]
    assert told["mean_absolute_error"] == 0
    assert told["mean"] == pytest.approx(told["measured_mean"])


def test_kinds_with_too_few_prompts_are_left_out() -> None:
    kinds = ["sign"] * 8 + ["food"] * 7
    table = kind_facts(kinds, np.arange(15.0), np.full(15, 0.4))
    assert table == {"sign": {"rows": 8, "need": 3.5, "cost_ratio": pytest.approx(0.4)}}
