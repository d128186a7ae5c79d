"""The codes as a map: near where they are alike, with the prompts of anybody among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aptp.router import Router
from aptp_platform.serve.messages import CodeMap, MappedPrompt
from aptp_platform.serve.routing.prompt_cache import score_prompts


@torch.no_grad()
def code_map(router: Router, prompts: Sequence[str]) -> CodeMap:
    """Classical scaling (Torgerson 1952) of the codes' features, and the prompts by Gower's formula (1968).

    Features have unit length, so distances are dot products: with G those of the codes, J the centring and
    J G J = V L V', codes lie at V sqrt(L) and a prompt at inv(sqrt(L)) V' J (s - mean G), in the two largest of L.
    """
    features = router.features(router.code_gates(router.codes))
    gram = (features @ features.T).double().cpu()
    count = len(gram)
    centring = torch.eye(count, dtype=gram.dtype) - 1 / count
    values, vectors = torch.linalg.eigh(centring @ gram @ centring)
    axes = torch.zeros(2, count, dtype=gram.dtype)  # a map of two codes is a line, of one a point
    lengths = torch.zeros(2, dtype=gram.dtype)
    for axis, index in enumerate(range(count - 1, max(count - 3, -1), -1)):
        if values[index] > 1e-9:
            axes[axis], lengths[axis] = vectors[:, index], values[index].sqrt()
    projection = axes @ centring / lengths.clamp(min=1e-9)[:, None]
    offset = gram.mean(0)
    found = score_prompts(router, prompts, None) if prompts else []
    similarities = torch.tensor([each.similarities for each in found], dtype=gram.dtype).reshape(len(found), count)
    places = ((similarities - offset) @ projection.T).tolist()
    return CodeMap(
        codes=tuple((x, y) for x, y in (axes * lengths[:, None]).T.tolist()),
        prompts=tuple(
            MappedPrompt(prompt, each.scores.index(max(each.scores)), (place[0], place[1]))
            for prompt, each, place in zip(prompts, found, places, strict=True)
        ),
        projection=(tuple(projection[0].tolist()), tuple(projection[1].tolist())),
        offset=tuple(offset.tolist()),
    )
