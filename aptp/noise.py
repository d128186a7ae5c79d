"""Random numbers of a step, drawn by lane: a row's noise does not depend on who computes the row.

A batch is an equal share of rows from each of some *lanes*, lane after lane, and every lane has a generator of its own.
One worker with eight lanes and two workers with four each draw the same for the same rows. A single generator is one
lane, None is torch's own.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def by_lane(rows: int, generators: Generators, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
    """`draw(count, generator)` of every lane for its share of the rows, joined.

    Raises:
        ValueError: the rows cannot be shared out equally.
    """
    if generators is None:
        generators = torch.default_generator
    lanes = [generators] if isinstance(generators, torch.Generator) else list(generators)
    if not lanes or rows % len(lanes):
        raise ValueError(f"{rows} rows cannot be {len(lanes)} equal lanes: give as many generators as divide the batch")
    return torch.cat([draw(rows // len(lanes), generator) for generator in lanes])


def gumbel_noise(logits: Float[Tensor, "row entry"], generators: Generators) -> Float[Tensor, "row entry"]:
    """Standard Gumbel noise -ln(-ln u) for some logits, drawn on the generators' device, in fp32."""
    rows, entries = logits.shape
    uniform = by_lane(rows, generators, lambda n, g: torch.rand(n, entries, generator=g, device=g.device))
    tiny = torch.finfo(torch.float32).tiny
    return -torch.log((-torch.log(uniform.clamp_min(tiny))).clamp_min(tiny)).to(logits.device)


def sample_noise(
    latents: Float[Tensor, "batch channel height width"], num_timesteps: int, generators: Generators
) -> tuple[Float[Tensor, "batch channel height width"], Int[Tensor, " batch"]]:
    """Noise like the latents and timesteps uniform in 0..num_timesteps-1, drawn on the generators' device."""
    count, *shape = latents.shape
    noise = by_lane(count, generators, lambda n, g: torch.randn(n, *shape, generator=g, device=g.device))
    timesteps = by_lane(
        count, generators, lambda n, g: torch.randint(num_timesteps, (n,), generator=g, device=g.device)
    )
    return noise.to(latents), timesteps.to(latents.device)
