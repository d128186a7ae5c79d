"""The map of the codes: prompts lie where their similarities place them, whatever decides their route."""

import pytest
import torch

from aptp_platform.serve.routing.prompt_cache import score_prompts
from aptp_platform.serve.routing.routing_map import code_map
from tests.support.tiny_pipeline import build_pipeline
from tests.support.tiny_release import ANCHORS, Routing, build_router


@pytest.mark.parametrize("routing", ["need", "similarity"])
def test_a_prompt_lies_by_its_similarities_and_has_the_code_that_the_router_gives_it(routing: Routing) -> None:
    router = build_router(build_pipeline(0).unet, 4, routing=routing)
    made = code_map(router, ANCHORS)
    scored = score_prompts(router, ANCHORS, None)
    assert [each.code for each in made.prompts] == router.route(ANCHORS).indices.tolist()
    for anchor, scores in zip(made.prompts, scored, strict=True):
        gone = torch.tensor(scores.similarities) - torch.tensor(made.offset)
        assert (torch.tensor(made.projection) @ gone).tolist() == pytest.approx(anchor.place, abs=1e-4)
    for place, anchor in zip(made.codes, made.prompts, strict=True):
        assert anchor.place == pytest.approx(place, abs=1e-3), "code k is what anchor k is predicted to need"

    router.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    biased = code_map(router, ANCHORS)
    assert [each.place for each in biased.prompts] == [each.place for each in made.prompts]
    assert {each.code for each in biased.prompts} == {0}
