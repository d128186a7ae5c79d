"""What a prompt-tailored code is compared with: codes of the same space at the same budget, chosen without learning.

Each runs through the same cut, fine-tuning and evaluation as a learned code. The learned single code for all prompts is
stage 1 with `RouterConfig(num_codes=1)`; `random_routing` asks what the routing itself is worth.
"""

from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from aptp.codes import ArchitectureCode, PruningSpace
from aptp.cost import CostTable
from aptp.sites import offer_of, producers_of


@torch.no_grad()
def unit_magnitudes(unet: nn.Module, space: PruningSpace) -> Float[Tensor, " width"]:
    """The 2-norm of all weights that go when a unit goes, over the mean of its site.

    That is a group's magnitude as in DepGraph (Fang et al. 2023, arXiv 2301.12900).
    """
    scores = []
    for site in space.width:
        offer = offer_of(site)
        owner: Any = unet.get_submodule(site.name.removesuffix(f".{offer.consumer}"))
        consumer: Any = unet.get_submodule(site.name)
        squares = consumer.weight.float().square().transpose(0, 1).flatten(1).sum(1)
        for producer in producers_of(owner, offer).values():
            rows = (
                producer.weight.float().square().flatten(1)
                if producer.weight.ndim > 1
                else producer.weight.float()[:, None] ** 2
            )
            squares += rows.sum(1).reshape(-1, site.channels).sum(0)  # GEGLU stacks two rows on a channel
        norms = squares.reshape(site.units, site.channels_per_unit).sum(1).sqrt()
        scores.append(norms / norms.mean())
    return torch.cat(scores).cpu()


def _best_within(
    space: PruningSpace,
    table: CostTable,
    budget: float,
    scores: Float[Tensor, " width"],
    depth: Bool[Tensor, " depth"] | None = None,
) -> ArchitectureCode:
    """The code that keeps the units of highest score, as many as meet the budget best; each site keeps its best one."""
    if not table.minimum <= budget <= 1:
        raise ValueError(f"budget {budget} is outside {table.minimum:.3f}..1, what this space can reach")
    depth = torch.ones(len(space.depth), dtype=torch.bool) if depth is None else depth
    kept_first = scores.clone()
    for site in space.width:
        entries = space.slice_of(site.name)
        kept_first[entries.start + int(scores[entries].argmax())] = inf
    order = kept_first.argsort(descending=True, stable=True)

    def bits_of(count: int) -> Tensor:
        bits = torch.zeros(space.width_entries, dtype=torch.bool)
        bits[order[:count]] = True
        return torch.cat([bits, depth])

    def ratio_of(count: int) -> float:
        return float(table.ratio(bits_of(count).float()[None])[0])

    low, high = len(space.width), space.width_entries
    if ratio_of(low) > budget:
        raise ValueError(
            f"budget {budget} needs layers to be dropped: with these kept, width alone reaches {ratio_of(low):.3f}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ratio_of(middle) <= budget else (low, middle)
    return ArchitectureCode(space, bits_of(min((low, high), key=lambda count: abs(ratio_of(count) - budget))))


def _quantiles(space: PruningSpace, scores: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    """Each unit's rank inside its site as a share, so that ordering by it thins all sites alike."""
    ranks = [scores[space.slice_of(site.name)].argsort(stable=True).argsort() / site.units for site in space.width]
    return torch.cat(ranks)


def uniform_code(unet: nn.Module, space: PruningSpace, table: CostTable, budget: float) -> ArchitectureCode:
    """The same share of every site, the units of largest magnitude; all depth kept."""
    return _best_within(space, table, budget, _quantiles(space, unit_magnitudes(unet, space)))


def magnitude_code(unet: nn.Module, space: PruningSpace, table: CostTable, budget: float) -> ArchitectureCode:
    """The units of largest normalised magnitude over the whole network; all depth kept."""
    return _best_within(space, table, budget, unit_magnitudes(unet, space))


def random_code(
    space: PruningSpace, table: CostTable, budget: float, *, generator: torch.Generator
) -> ArchitectureCode:
    """The same share of every site, drawn at random; all depth kept."""
    return _best_within(space, table, budget, _quantiles(space, torch.rand(space.width_entries, generator=generator)))


def block_removal_code(unet: nn.Module, space: PruningSpace, table: CostTable, budget: float) -> ArchitectureCode:
    """Whole layers are removed, innermost first, until the next would undershoot the budget (BK-SDM, Kim et al. 2023,
    arXiv 2305.15798, which has three fixed sizes); what is left to the budget is cut evenly from the widths."""
    order = range(len(space.depth)) if space.keep_order is None else space.keep_order[1:]  # the first never goes
    depth = torch.ones(len(space.depth), dtype=torch.bool)
    full = torch.ones(space.width_entries)
    for index in reversed(order):
        depth[index] = False
        if float(table.ratio(torch.cat([full, depth.float()])[None])[0]) < budget:
            depth[index] = True
            break
    return _best_within(space, table, budget, _quantiles(space, unit_magnitudes(unet, space)), depth)


def random_routing(indices: Int[Tensor, " prompt"], *, generator: torch.Generator) -> Int[Tensor, " prompt"]:
    """The learned routes dealt anew among the prompts: every code keeps its number of prompts, only the match goes."""
    return indices[torch.randperm(len(indices), generator=generator).to(indices.device)]
