"""Which model a request goes to: the nearest code, the one asked for, or the largest that fits budget and deadline."""

import pickle
from dataclasses import replace

import pytest

from aptp_platform.serve.messages import TEACHER, ApiError, Catalog, Choice, GenerationRequest, ModelFacts, ModelLoad
from aptp_platform.serve.routing.prompt_cache import PromptScores
from aptp_platform.serve.routing.selection import Situation, choose, decide

CATALOG = Catalog(
    "0123456789ab",
    (64, 64),
    (
        ModelFacts("code-00", 0.50, 5.0e8, 10, 0.3),
        ModelFacts("code-01", 0.80, 8.0e8, 16, 0.3),
        ModelFacts("code-02", 0.80, 8.0e8, 16, 0.4),
        ModelFacts(TEACHER, 1.0, 1e9, None, None),
    ),
)
IDLE = Situation(CATALOG, {model.name: 4 for model in CATALOG.models})
TIMED = replace(IDLE, loads={"code-00": ModelLoad(0, 10.0)})  # 20 ms a step for the teacher's MACs
REQUEST = GenerationRequest("a cat", (1,), num_inference_steps=10, guidance_scale=7.5, size=(64, 64))
NEAR_0 = PromptScores((0.9, 0.5, 0.7))


def test_the_nearest_code_is_the_choice_and_the_margin_its_lead() -> None:
    choice = choose(REQUEST, NEAR_0, IDLE)
    assert (choice.model, choice.routed, choice.reason, choice.ratio) == ("code-00", "code-00", "routed", 0.5)
    assert choice.margin == pytest.approx(0.2)
    assert choice.similarities == NEAR_0.similarities
    assert choice.expected_ms is None, "nothing was timed yet"


def test_a_single_code_has_no_margin() -> None:
    alone = replace(IDLE, catalog=replace(CATALOG, models=CATALOG.models[:1]))
    assert choose(REQUEST, PromptScores((0.9,)), alone).margin == 0.0


def test_a_model_that_is_asked_for_is_taken_and_the_route_should_log() -> None:
    choice = choose(replace(REQUEST, model=TEACHER), NEAR_0, IDLE)
    assert (choice.model, choice.routed, choice.reason, choice.ratio) == (TEACHER, "code-00", "asked", 1.0)


@pytest.mark.parametrize(("budget", "model"), [(0.5, "code-00"), (0.79, "code-00"), (0.8, "code-02"), (1.0, TEACHER)])
def test_a_budget_takes_the_largest_that_fits_and_the_nearest_of_equals(budget: float, model: str) -> None:
    choice = choose(replace(REQUEST, budget=budget), NEAR_0, IDLE)
    assert (choice.model, choice.reason, choice.routed) == (model, "budget", "code-00")


def test_more_budget_never_means_a_smaller_model() -> None:
    ratios = [choose(replace(REQUEST, budget=budget / 100), NEAR_0, IDLE).ratio for budget in range(50, 101)]
    assert ratios == sorted(ratios)


def test_a_budget_below_every_model_is_refused_with_the_cheapest_offer() -> None:
    with pytest.raises(ApiError, match=r"code-00 at 0\.500") as caught:
        choose(replace(REQUEST, budget=0.3), NEAR_0, IDLE)
    assert (caught.value.status, caught.value.param, caught.value.retry) == (422, "budget", False)
    with pytest.raises(ApiError, match="teacher at 1"):
        choose(replace(REQUEST, budget=0.5, model=TEACHER), NEAR_0, IDLE)


@pytest.mark.parametrize(("deadline", "model"), [(100, "code-00"), (160, "code-02"), (500, TEACHER)])
def test_a_deadline_takes_the_largest_that_is_fast_enough(deadline: float, model: str) -> None:
    choice = choose(replace(REQUEST, deadline_ms=deadline), NEAR_0, TIMED)
    assert (choice.model, choice.reason) == (model, "deadline")
    assert choice.expected_ms is not None
    assert choice.expected_ms <= deadline + 1e-6


def test_budget_and_deadline_hold_together() -> None:
    assert choose(replace(REQUEST, deadline_ms=500, budget=0.8), NEAR_0, TIMED).model == "code-02"


def test_a_queue_counts_and_makes_the_refusal_a_temporary_one() -> None:
    loads = {model.name: ModelLoad(8, 20 * model.ratio, steps=80) for model in CATALOG.models}
    busy = replace(IDLE, loads=loads)
    assert choose(replace(REQUEST, deadline_ms=300), NEAR_0, busy).model == "code-00"
    with pytest.raises(ApiError, match="code-00 in about 300 ms") as caught:
        choose(replace(REQUEST, deadline_ms=150), NEAR_0, busy)
    assert caught.value.status == 429
    assert caught.value.retry_after_s == pytest.approx(0.15)
    with pytest.raises(ApiError) as caught:
        choose(replace(REQUEST, deadline_ms=50), NEAR_0, busy)
    assert (caught.value.status, caught.value.retry) == (422, False)


def test_long_orders_before_it_count_as_long() -> None:
    place_free = replace(IDLE, loads={"code-00": ModelLoad(3, 10.0, steps=300)})
    full = replace(IDLE, loads={"code-00": ModelLoad(4, 10.0, steps=400)})
    code = CATALOG.models[0]
    assert place_free.expected_ms(REQUEST, code) == 100, "it joins at the next step"
    assert full.expected_ms(REQUEST, code) == 100 + 400 / 4 * 10


def test_a_busy_code_overflows_to_the_nearest_of_its_size_with_room() -> None:
    """10 steps of 10 ms at code-00 and a target of 250 ms: two waves of four."""
    busy = replace(TIMED, target_ms=250, loads={"code-00": ModelLoad(8, 10.0, 1), "code-01": ModelLoad(4, 16.0, 1)})
    (choice,) = decide([REQUEST], [PromptScores((0.9, 0.8, 0.7))], busy)
    assert isinstance(choice, Choice)
    assert (choice.model, choice.routed, choice.reason) == ("code-02", "code-00", "overflow"), "code-01 is full too"
    twice = replace(busy, loads={**busy.loads, "code-00": ModelLoad(8, 10.0, replicas=2)})
    (choice,) = decide([REQUEST], [PromptScores((0.9, 0.8, 0.7))], twice)
    assert isinstance(choice, Choice)
    assert choice.reason == "routed", "a second replica is room"


def test_without_a_target_only_a_code_without_a_replica_overflows() -> None:
    busy = replace(IDLE, loads={"code-00": ModelLoad(999, 10.0, 1)})
    asleep = replace(IDLE, loads={"code-00": ModelLoad(replicas=0)})
    (first,), (second,) = (decide([REQUEST], [NEAR_0], situation) for situation in (busy, asleep))
    assert isinstance(first, Choice)
    assert isinstance(second, Choice)
    assert (first.model, first.reason) == ("code-00", "routed")
    assert (second.model, second.routed, second.reason) == ("code-02", "code-00", "cold")


def test_orders_that_arrive_together_are_decided_each_by_its_own_wishes() -> None:
    requests = [REQUEST, replace(REQUEST, budget=0.1), replace(REQUEST, model=TEACHER)]
    first, second, third = decide(requests, [NEAR_0] * 3, IDLE)
    assert isinstance(first, Choice)
    assert isinstance(second, ApiError)
    assert isinstance(third, Choice)
    assert (first.reason, second.status, third.reason) == ("routed", 422, "asked")


def test_a_refusal_survives_the_way_between_processes() -> None:
    refusal = ApiError(429, "no room", code="full", param="n", retry_after_s=2.5, retry=True)
    assert vars(pickle.loads(pickle.dumps(refusal))) == vars(refusal)
