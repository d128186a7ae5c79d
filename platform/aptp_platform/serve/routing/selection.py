"""Which model a request goes to: a pure function of the router's scores, the release's facts and the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

from aptp_platform.serve.messages import (
    AUTO,
    TEACHER,
    ApiError,
    Catalog,
    Choice,
    GenerationRequest,
    ModelFacts,
    ModelLoad,
    Prediction,
    Reason,
)
from aptp_platform.serve.routing.overflow import SMALLER, place
from aptp_platform.serve.routing.prompt_cache import PromptScores

STANDS_IN_FOR_COLD: Final = ("cold", "cold_smaller")  # the reasons that call for a start of the sleeping code


@dataclass(frozen=True)
class Situation:
    """What a decision rests on besides the prompt.

    batch_sizes: images that one replica of each model makes at once. target_ms: an image that would take longer at its
    best code goes to another with room; None: only a code without a replica is left alone.
    """

    catalog: Catalog
    batch_sizes: Mapping[str, int]
    loads: Mapping[str, ModelLoad] = field(default_factory=dict)
    target_ms: float | None = None

    def load(self, name: str) -> ModelLoad:
        return self.loads.get(name, ModelLoad())

    def slots(self, name: str) -> int:
        """Images that a model makes at once; at least one replica's, since one would be started."""
        return self.batch_sizes[name] * max(1, self.load(name).replicas or 1)

    def is_cold(self, name: str) -> bool:
        """Whether a model has no replica now."""
        return self.load(name).replicas == 0

    def room(self, request: GenerationRequest, model: ModelFacts) -> float:
        """How many more images like the request's a model takes before one would miss the target."""
        if self.is_cold(model.name):
            return 0.0
        alone = self.alone_ms(request, model)
        if self.target_ms is None or not alone:
            return inf
        return max(0.0, self.slots(model.name) * (self.target_ms // alone) - self.load(model.name).running)

    def alone_ms(self, request: GenerationRequest, model: ModelFacts) -> float | None:
        """Milliseconds to one image without a queue.

        A model that was not timed yet is taken to be as fast for its MACs as those that were; None before any was.
        """
        timed = {name: load.step_ms for name, load in self.loads.items() if load.step_ms is not None}
        if not timed:
            return None
        rates = [step_ms / self.catalog.find(name).ratio for name, step_ms in timed.items()]
        step_ms = timed.get(model.name, model.ratio * sum(rates) / len(rates))
        return request.steps * step_ms

    def expected_ms(self, request: GenerationRequest, model: ModelFacts) -> float | None:
        """Milliseconds to one image, behind all the steps that are ordered before it if no place is free."""
        alone, load, slots = self.alone_ms(request, model), self.load(model.name), self.slots(model.name)
        if alone is None or load.running < slots:
            return alone
        return alone * (1 + load.steps / slots / request.steps)


def decide(
    requests: Sequence[GenerationRequest], scores: Sequence[PromptScores], situation: Situation
) -> list[Choice | ApiError]:
    """The choices of requests that arrived together; those that leave the model to the router share the codes' room."""
    free = [index for index, request in enumerate(requests) if request.model == AUTO and not _has_wishes(request)]
    homes: dict[int, ModelFacts] = {}
    if free:
        codes = situation.catalog.codes
        rooms = [min(situation.room(requests[index], code) for index in free) for code in codes]
        losses = [lost for index in free if (lost := scores[index].losses) is not None]
        placed = place([scores[index].scores for index in free], [code.ratio for code in codes], rooms, losses or None)
        homes = {index: _awake(codes[code], scores[index], situation) for index, code in zip(free, placed, strict=True)}
    answers: list[Choice | ApiError] = []
    for index, request in enumerate(requests):
        try:
            answers.append(choose(request, scores[index], situation, homes.get(index)))
        except ApiError as error:
            answers.append(error)
    return answers


def _awake(home: ModelFacts, scores: PromptScores, situation: Situation) -> ModelFacts:
    """The home, unless it sleeps and nothing that is as good may stand in: then the code with the next best score that
    is awake, smaller or not, rather than a wait for a replica to start."""
    codes = situation.catalog.codes
    awake = [index for index, code in enumerate(codes) if not situation.is_cold(code.name)]
    if not situation.is_cold(home.name) or not awake:
        return home
    return codes[max(awake, key=lambda index: scores.scores[index])]


def choose(
    request: GenerationRequest, scores: PromptScores, situation: Situation, placed: ModelFacts | None = None
) -> Choice:
    """The model of a request.

    A model that was asked for is taken, if it fits; otherwise one that sleeps is no candidate. Under a budget or a
    deadline it is the best of the models that fit, the teacher among them; with a price alone, the best code at that
    price (`_best`). Else it is the code with the highest score, or where `decide` placed the request.

    Raises:
        ApiError: 400 for a price where the router predicts no losses; 404 when this release has no such model (during
            a rollout the ingress may know one that has), 422 when no model can fit, with the cheapest offer; 429 when
            one could if its queue were shorter.
    """
    catalog = situation.catalog
    ranked = sorted(scores.scores, reverse=True)
    routed = catalog.codes[scores.scores.index(ranked[0])]
    candidates = [model for model in catalog.models if request.model in (AUTO, model.name)]
    if not candidates:
        raise ApiError(404, f"The model {request.model!r} does not exist.", code="model_not_found", param="model")
    if request.price is not None and scores.losses is None:
        message = (
            f"Invalid 'price': release {catalog.release} routes by similarity, so there is no predicted loss to weigh "
            "a price against; send 'budget' or 'deadline_ms'."
        )
        raise ApiError(400, message, code="invalid_value", param="price")
    reason: Reason = "routed" if request.model == AUTO else "asked"
    chosen = routed if request.model == AUTO else candidates[0]
    if placed is not None and placed != routed:
        chosen, reason = placed, "overflow"
        if situation.is_cold(routed.name):
            reason = "cold_smaller" if placed.ratio < routed.ratio - SMALLER else "cold"
    if _has_wishes(request):
        if request.model == AUTO:
            reason = _wish(request)
            candidates = [model for model in candidates if reason != "price" or model.name != TEACHER]
        affordable = _within_budget(request, candidates)
        awake = [model for model in affordable if not situation.is_cold(model.name)]
        chosen = _best(request, _within_deadline(request, awake or affordable, situation), scores, catalog)
    return Choice(
        model=chosen.name,
        routed=routed.name,
        reason=reason,
        scores=scores.scores,
        margin=ranked[0] - ranked[1] if len(ranked) > 1 else 0.0,
        similarities=scores.similarities,
        predictions=_predictions(scores, catalog),
        ratio=chosen.ratio,
        macs=chosen.macs,
        price=scores.price,
        expected_ms=situation.expected_ms(request, chosen),
        familiarity=scores.familiarity,
        unknown=scores.unknown,
    )


def _has_wishes(request: GenerationRequest) -> bool:
    """Whether it says what the image may cost: such a request waits for the model that it gets."""
    return any(wish is not None for wish in (request.budget, request.deadline_ms, request.price))


def _wish(request: GenerationRequest) -> Reason:
    if request.deadline_ms is not None:
        return "deadline"
    return "price" if request.budget is None else "budget"


def _best(
    request: GenerationRequest, fitting: Sequence[ModelFacts], scores: PromptScores, catalog: Catalog
) -> ModelFacts:
    """The least predicted loss + price x ratio, of equals the cheapest. A limit alone comes at price 0: within it, cost
    does not matter. Without predictions the largest model, of equals the one with the highest score."""
    if scores.losses is None:
        nearness = {code.name: value for code, value in zip(catalog.codes, scores.scores, strict=True)}
        return max(fitting, key=lambda model: (round(model.ratio, 2), nearness.get(model.name, max(scores.scores))))
    price = request.price or 0.0
    losses = {each.model: each.loss or 0.0 for each in _predictions(scores, catalog)}
    return min(fitting, key=lambda model: (losses[model.name] + price * model.ratio, model.ratio, losses[model.name]))


def _predictions(scores: PromptScores, catalog: Catalog) -> tuple[Prediction, ...]:
    lost = {TEACHER: None if scores.losses is None else 0.0}
    if scores.losses is not None:
        lost.update({code.name: value for code, value in zip(catalog.codes, scores.losses, strict=True)})
    return tuple(Prediction(each.name, each.ratio, each.macs, lost.get(each.name)) for each in catalog.models)


def _within_budget(request: GenerationRequest, candidates: Sequence[ModelFacts]) -> Sequence[ModelFacts]:
    if request.budget is None:
        return candidates
    fitting = [model for model in candidates if model.ratio <= request.budget + 1e-9]
    if not fitting:
        cheapest = min(candidates, key=lambda model: model.ratio)
        message = (
            f"No model fits 'budget' {request.budget:g}: the cheapest is {cheapest.name} at {cheapest.ratio:.3f} of "
            f"the {TEACHER}'s MACs."
        )
        raise ApiError(422, message, code="budget_infeasible", param="budget", retry=False)
    return fitting


def _within_deadline(
    request: GenerationRequest, candidates: Sequence[ModelFacts], situation: Situation
) -> Sequence[ModelFacts]:
    limit = request.deadline_ms
    if limit is None:
        return candidates
    expected = {model.name: situation.expected_ms(request, model) or 0.0 for model in candidates}
    fitting = [model for model in candidates if expected[model.name] <= limit]
    if fitting:
        return fitting
    soonest = min(candidates, key=lambda model: expected[model.name])
    wait_ms = expected[soonest.name]
    message = f"No model meets 'deadline_ms' {limit:g}: the soonest is {soonest.name} in about {wait_ms:.0f} ms."
    if any((situation.alone_ms(request, model) or 0.0) <= limit for model in candidates):
        raise ApiError(
            429, message, code="deadline_infeasible", param="deadline_ms", retry_after_s=(wait_ms - limit) / 1e3
        )
    raise ApiError(422, message, code="deadline_infeasible", param="deadline_ms", retry=False)
