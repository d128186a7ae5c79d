"""Which model a request goes to: the best code, the one asked for, or the best that fits budget, deadline and price."""

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


def by_similarity(*values: float) -> PromptScores:
    """Of a router that predicts no losses."""
    return PromptScores(values, values)


def by_need(*losses: float, price: float = 0.5) -> PromptScores:
    """Of a router that does; every similarity is the same."""
    scores = (-loss - price * code.ratio for loss, code in zip(losses, CATALOG.codes, strict=True))
    return PromptScores(tuple(scores), (0.5,) * len(losses), losses, price)


NEAR_0 = by_similarity(0.9, 0.5, 0.7)
EASY = by_need(0.12, 0.04, 0.03)  # at its price code-00, the cheapest
HARD = by_need(0.60, 0.20, 0.35)  # code-01


def test_the_nearest_code_is_the_choice_and_the_margin_its_lead() -> None:
    choice = choose(REQUEST, NEAR_0, IDLE)
    assert (choice.model, choice.routed, choice.reason, choice.ratio) == ("code-00", "code-00", "routed", 0.5)
    assert choice.margin == pytest.approx(0.2)
    assert choice.similarities == NEAR_0.similarities
    assert choice.expected_ms is None, "nothing was timed yet"


def test_a_single_code_has_no_margin() -> None:
    alone = replace(IDLE, catalog=replace(CATALOG, models=CATALOG.models[:1]))
    assert choose(REQUEST, by_similarity(0.9), alone).margin == 0.0


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


def test_by_need_the_choice_says_what_each_model_is_predicted_to_lose() -> None:
    choice = choose(REQUEST, EASY, IDLE)
    assert (choice.model, choice.reason, choice.routing, choice.price) == ("code-00", "routed", "need", 0.5)
    assert choice.margin == pytest.approx(0.03 + 0.5 * 0.8 - 0.12 - 0.5 * 0.5)
    assert [(each.model, each.ratio, each.loss) for each in choice.predictions] == [
        ("code-00", 0.5, 0.12),
        ("code-01", 0.8, 0.04),
        ("code-02", 0.8, 0.03),
        (TEACHER, 1.0, 0.0),
    ]
    assert choice.predicted_loss == 0.12
    assert choose(replace(REQUEST, model=TEACHER), EASY, IDLE).predicted_loss == 0

    old = choose(REQUEST, NEAR_0, IDLE)
    assert (old.routing, old.price, old.predicted_loss) == ("similarity", None, None)
    assert {each.loss for each in old.predictions} == {None}


@pytest.mark.parametrize(
    ("losses", "budget", "model"),
    [
        ((0.12, 0.04, 0.03), 0.79, "code-00"),
        ((0.12, 0.04, 0.03), 0.8, "code-02"),
        ((0.02, 0.04, 0.03), 0.8, "code-00"),
        ((0.03, 0.03, 0.03), 0.8, "code-00"),
        ((0.12, 0.04, 0.03), 1.0, TEACHER),
    ],
)
def test_by_need_a_budget_takes_the_least_predicted_loss_and_the_cheapest_of_equals(
    losses: tuple[float, ...], budget: float, model: str
) -> None:
    choice = choose(replace(REQUEST, budget=budget), by_need(*losses), IDLE)
    assert (choice.model, choice.reason) == (model, "budget")


def test_by_need_a_deadline_takes_the_least_predicted_loss_of_those_in_time() -> None:
    assert choose(replace(REQUEST, deadline_ms=160), by_need(0.12, 0.04, 0.05), TIMED).model == "code-01"
    assert choose(replace(REQUEST, deadline_ms=160), by_need(0.02, 0.04, 0.05), TIMED).model == "code-00"
    assert choose(replace(REQUEST, deadline_ms=500), by_need(0.02, 0.04, 0.05), TIMED).model == TEACHER


@pytest.mark.parametrize("scores", [EASY, HARD])
def test_a_higher_price_never_means_a_dearer_code(scores: PromptScores) -> None:
    prices = [0.0, *(0.01 * 2**step for step in range(20)), 1e300]
    chosen = [choose(replace(REQUEST, price=price), scores, IDLE) for price in prices]
    assert {(each.reason, each.routed, each.price) for each in chosen} == {("price", chosen[0].routed, 0.5)}
    assert [each.ratio for each in chosen] == sorted((each.ratio for each in chosen), reverse=True)
    assert scores.losses is not None
    assert chosen[0].predicted_loss == min(scores.losses), "of the experts; the teacher takes a budget or its name"
    assert chosen[-1].model == "code-00"


def test_at_the_release_s_own_price_a_request_gets_the_router_s_code() -> None:
    assert [choose(replace(REQUEST, price=0.5), each, IDLE).model for each in (EASY, HARD)] == ["code-00", "code-01"]


def test_a_price_counts_within_a_limit() -> None:
    cheap, dear = (choose(replace(REQUEST, budget=1.0, price=price), HARD, IDLE) for price in (2.0, 0.0))
    assert (cheap.model, cheap.reason, dear.model) == ("code-00", "budget", TEACHER)


def test_a_price_without_predicted_losses_is_refused() -> None:
    with pytest.raises(ApiError, match="release 0123456789ab routes by similarity") as caught:
        choose(replace(REQUEST, price=0.0), NEAR_0, IDLE)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", "price")


def test_long_orders_before_it_count_as_long() -> None:
    place_free = replace(IDLE, loads={"code-00": ModelLoad(3, 10.0, steps=300)})
    full = replace(IDLE, loads={"code-00": ModelLoad(4, 10.0, steps=400)})
    code = CATALOG.models[0]
    assert place_free.expected_ms(REQUEST, code) == 100, "it joins at the next step"
    assert full.expected_ms(REQUEST, code) == 100 + 400 / 4 * 10


def test_a_busy_code_overflows_to_the_nearest_of_its_size_with_room() -> None:
    """10 steps of 10 ms at code-00 and a target of 250 ms: two waves of four."""
    busy = replace(TIMED, target_ms=250, loads={"code-00": ModelLoad(8, 10.0, 1), "code-01": ModelLoad(4, 16.0, 1)})
    (choice,) = decide([REQUEST], [by_similarity(0.9, 0.8, 0.7)], busy)
    assert isinstance(choice, Choice)
    assert (choice.model, choice.routed, choice.reason) == ("code-02", "code-00", "overflow"), "code-01 is full too"
    twice = replace(busy, loads={**busy.loads, "code-00": ModelLoad(8, 10.0, replicas=2)})
    (choice,) = decide([REQUEST], [by_similarity(0.9, 0.8, 0.7)], twice)
    assert isinstance(choice, Choice)
    assert choice.reason == "routed", "a second replica is room"


def test_by_need_a_busy_code_overflows_to_what_loses_about_as_little() -> None:
    full = replace(TIMED, target_ms=250, loads={"code-02": ModelLoad(8, 16.0, 1)})
    scores = [by_need(0.104, 0.15, 0.10, price=0.01), by_need(0.12, 0.105, 0.10, price=0.01)]
    for each, stand_in in zip(scores, ("code-00", "code-01"), strict=True):
        (choice,) = decide([REQUEST], [replace(each, scores=(0.1, 0.2, 0.3))], full)
        assert isinstance(choice, Choice)
        assert (choice.model, choice.routed, choice.reason) == (stand_in, "code-02", "overflow")
    (choice,) = decide([replace(REQUEST, price=0.0)], scores[:1], full)
    assert isinstance(choice, Choice)
    assert (choice.model, choice.reason) == ("code-02", "price"), "who names a price waits for what it buys"


def test_without_a_target_only_a_code_without_a_replica_overflows() -> None:
    busy = replace(IDLE, loads={"code-00": ModelLoad(999, 10.0, 1)})
    asleep = replace(IDLE, loads={"code-00": ModelLoad(replicas=0)})
    (first,), (second,) = (decide([REQUEST], [NEAR_0], situation) for situation in (busy, asleep))
    assert isinstance(first, Choice)
    assert isinstance(second, Choice)
    assert (first.model, first.reason) == ("code-00", "routed")
    assert (second.model, second.routed, second.reason) == ("code-02", "code-00", "cold")


def test_a_sleeping_model_is_no_candidate_of_a_wish_unless_it_is_named_or_nothing_else_fits() -> None:
    asleep = replace(TIMED, loads={"code-00": ModelLoad(0, 10.0, 1), "code-02": ModelLoad(replicas=0),
                                   TEACHER: ModelLoad(replicas=0)})  # fmt: skip
    for wish in (replace(REQUEST, budget=1.0), replace(REQUEST, deadline_ms=500), replace(REQUEST, budget=1, price=0)):
        assert choose(wish, HARD, asleep).model == "code-01"
    assert choose(replace(REQUEST, price=0.0), HARD, asleep).model == "code-01"
    assert choose(replace(REQUEST, budget=1.0, model=TEACHER), NEAR_0, asleep).model == TEACHER
    all_asleep = replace(IDLE, loads={model.name: ModelLoad(replicas=0) for model in CATALOG.models})
    assert choose(replace(REQUEST, budget=0.6), NEAR_0, all_asleep).model == "code-00", "somebody must wake"
    codes_asleep = replace(IDLE, loads={code.name: ModelLoad(replicas=0) for code in CATALOG.codes})
    assert choose(replace(REQUEST, price=0.0), EASY, codes_asleep).model == "code-02", "a price buys no teacher"


def test_a_sleeping_code_without_an_equal_is_stood_in_for_by_the_nearest_awake_one_and_says_so() -> None:
    nearest_is_2 = by_similarity(0.5, 0.7, 0.9)
    asleep = replace(IDLE, loads={"code-02": ModelLoad(replicas=0), "code-01": ModelLoad(replicas=0)})
    (choice,) = decide([REQUEST], [nearest_is_2], asleep)
    assert isinstance(choice, Choice)
    assert (choice.model, choice.routed, choice.reason) == ("code-00", "code-02", "cold_smaller")
    (choice,) = decide([REQUEST], [replace(HARD, scores=(0.1, 0.2, 0.3))], asleep)
    assert isinstance(choice, Choice)
    assert (choice.model, choice.reason) == ("code-00", "cold_smaller"), "though it loses far more"
    all_asleep = replace(IDLE, loads={code.name: ModelLoad(replicas=0) for code in CATALOG.codes})
    (choice,) = decide([REQUEST], [nearest_is_2], all_asleep)
    assert isinstance(choice, Choice)
    assert (choice.model, choice.reason) == ("code-02", "routed"), "it is started"


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
