"""What the library's machinery costs, as ratios to the work it wraps, each beside its target.

    make bench-aptp

One process, one thread, calls taking turns, process CPU seconds, the minimum of three rounds (of fifteen for what takes
less than a second: there a busy neighbour weighs more). First Stable Diffusion
2.1-base's UNet (random weights, 64 x 64 latents, 77 tokens), then a pruning step on the emoji teacher.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from aptp import (
    ArchitectureCode,
    BaseModel,
    Batch,
    CostTable,
    PruningConfig,
    PruningSpace,
    PruningStage,
    Router,
    RouterConfig,
    cost_table,
    gated,
    load_expert,
    read_space,
    save_expert,
    slice_unet,
)
from aptp.losses import Gather, alone
from aptp.noise import Noise
from benchmarks.clock import Figure, cpu_seconds, machine, peak_growth, print_table, return_freed_memory, write_results

SD21_BASE = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
TEACHER = Path("examples/emoji/teacher")
ROUNDS = 3


def forward_of(unet: nn.Module, size: tuple[int, int], tokens: int, batch: int = 1) -> Callable[[nn.Module], Tensor]:
    """One forward pass without gradients on fixed inputs that suit `unet`, of it or of a network cut from it."""
    config: Any = unet.config
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, config.in_channels, *size, generator=noise)
    texts = torch.randn(batch, tokens, config.cross_attention_dim, generator=noise)
    timesteps = torch.full((batch,), 500)

    @torch.no_grad()
    def forward(network: nn.Module) -> Tensor:
        return network(latents, timesteps, encoder_hidden_states=texts, return_dict=False)[0]

    return forward


def codes_to_slice(space: PruningSpace) -> dict[str, ArchitectureCode]:
    """Uniform 0.8, 0.6 and 0.4 of every width, and five random ones that drop layers too."""
    codes = {}
    all_depth = torch.ones(len(space.depth), dtype=torch.bool)
    for share in (0.8, 0.6, 0.4):
        kept = [torch.arange(site.units) < max(1, round(share * site.units)) for site in space.width]
        codes[f"uniform {share}"] = ArchitectureCode(space, torch.cat([*kept, all_depth]))
    for seed in range(5):
        dice = torch.Generator().manual_seed(seed)
        kept = []
        for site in space.sites:
            likely = torch.empty(1).uniform_(0.3, 0.9, generator=dice)
            bits = torch.rand(site.units, generator=dice) < likely
            if site in space.width:
                bits[torch.randint(site.units, (1,), generator=dice)] = True
            kept.append(bits)
        codes[f"random {seed}"] = ArchitectureCode(space, torch.cat(kept))
    return codes


def num_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def full_size(rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """Gates, slices and experts of an 866 M UNet."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD21_BASE).eval().requires_grad_(False)
    space = read_space(unet)
    table = cost_table(unet, space, (64, 64))
    forward = forward_of(unet, (64, 64), 77)
    forward(unet)

    def open_gates() -> Tensor:
        with gated(unet, space):
            return forward(unet)

    opened = cpu_seconds({"stock": partial(forward, unet), "open": open_gates}, rounds)
    figures = [Figure("open gates / stock forward", opened["open"] / opened["stock"], 1.02)]

    rows: dict[str, dict[str, float]] = {}
    for name, code in codes_to_slice(space).items():
        small = slice_unet(unet, code)
        forward(small)
        seconds = cpu_seconds({"whole": partial(forward, unet), "slice": partial(forward, small)}, rounds)
        ratio = float(table.ratio(code.mask[None]))
        speedup = seconds["whole"] / seconds["slice"]
        rows[name] = {"macs_ratio": ratio, **seconds, "speedup": speedup, "efficiency": speedup * ratio}
        print(f"  {name}: {ratio:.3f} of the MACs, {speedup:.2f} times as fast, efficiency {speedup * ratio:.3f}")
        del small
    efficiencies = [row["efficiency"] for row in rows.values()]
    figures += [
        Figure("slices: realised / MACs speed-up, median", median(efficiencies), 0.97, at_least=True),
        Figure("slices: realised / MACs speed-up, least", min(efficiencies), 0.92, at_least=True),
    ]
    figures += slicing_and_loading(unet, space, table, rounds)
    return figures, {"slices": rows, "open_gates_s": opened}


def slicing_and_loading(unet: nn.Module, space: PruningSpace, table: CostTable, rounds: int) -> list[Figure]:
    code = codes_to_slice(space)["uniform 0.8"]
    seconds = cpu_seconds({"slicing": lambda: slice_unet(unet, code)}, rounds)["slicing"]
    return_freed_memory()
    grown = peak_growth(lambda: slice_unet(unet, code))
    small = slice_unet(unet, code)
    with tempfile.TemporaryDirectory() as folder:
        save_expert(folder, small, code, base=BaseModel("random weights", "0" * 64), cost=table)
        weights, size = Path(folder) / "expert.safetensors", num_bytes(small)
        del small

        def load() -> float:
            # Tensors of a mapped file are read when they are touched: every page of them is.
            return sum(
                float(parameter.detach().view(-1)[::1024].sum()) for parameter in load_expert(folder).parameters()
            )

        loading = cpu_seconds({"bytes": weights.read_bytes, "expert": load}, rounds)
    return [
        Figure("slicing the UNet", seconds, 10.0, unit="CPU s"),
        Figure("slicing: peak memory / the slice's weights", grown / size, 1.3),
        Figure("loading an expert / reading its bytes", loading["expert"] / loading["bytes"], 1.1),
    ]


class RouterAlone(PruningStage):
    """A pruning step without its UNet: router, gates, transport, cost and their losses."""

    def _denoise(
        self, batch: Batch, mask: Tensor, noise: Noise, gather: Gather = alone
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        errors = mask.detach().mean(1)
        return {"denoising": mask.square().mean()}, errors, errors, torch.full_like(errors, 0.5)


def step_of(stage: PruningStage, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        stage(batch, noise=Noise(0, 1, batch.rows)).total.backward()

    return step


def step_calls(batch_size: int) -> dict[str, Callable[[], None]]:
    """A step of stage 1 on the emoji teacher, its router alone, and the passes of the plain UNet that no step can do
    without: a forward pass for the teacher, a forward and a backward pass without gradients of weights."""
    unet: Any = UNet2DConditionModel.from_pretrained(TEACHER, subfolder="unet", use_safetensors=True).float().eval()
    unet.requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(TEACHER, subfolder="scheduler")
    space = read_space(unet)
    table = cost_table(unet, space, (16, 16), 32)
    noise = torch.Generator().manual_seed(0)
    shapes = ((batch_size, 4, 16, 16), (batch_size, 32, 384), (batch_size, 384))
    latents, texts, embeddings = (torch.randn(shape, generator=noise) for shape in shapes)
    batch = Batch(latents, texts, embeddings, torch.arange(batch_size))
    router = Router(space, RouterConfig(num_codes=4, embedding_dim=384))
    config = PruningConfig(budget=0.65, warmup_steps=0)
    timesteps = torch.full((batch_size,), 500)

    def plain() -> None:
        with torch.no_grad():
            teacher = unet(batch.latents, timesteps, batch.text_states, return_dict=False)[0]
        leaf = batch.latents.clone().requires_grad_()
        F.mse_loss(unet(leaf, timesteps, batch.text_states, return_dict=False)[0], teacher + 1).backward()

    calls = {
        "plain": plain,
        "pruning": step_of(PruningStage(unet, space, table, router, scheduler, config), batch),
        "router": step_of(RouterAlone(unet, space, table, router, scheduler, config), batch),
    }
    for call in calls.values():
        call()
    return calls


def step_time(calls: dict[str, Callable[[], None]], rounds: int) -> tuple[list[Figure], dict[str, float]]:
    seconds = cpu_seconds(calls, 5 * rounds)
    return [
        Figure("pruning step / plain passes", seconds["pruning"] / seconds["plain"], 1.10),
        Figure("router, gates and cost / pruning step", seconds["router"] / seconds["pruning"], 0.02),
    ], seconds


def step_memory(calls: dict[str, Callable[[], None]], rounds: int) -> tuple[list[Figure], dict[str, int]]:
    grown = {name: min(peak_growth(call) for _ in range(rounds)) for name, call in calls.items()}
    return [Figure("pruning step / plain passes, peak memory", grown["pruning"] / grown["plain"], 1.20)], grown


def routing(rounds: int) -> list[Figure]:
    """Routes of 1,000 prompts in the space of SD 2.1 with the paper's 16 codes and 768-d embeddings."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD21_BASE)
    router = Router(read_space(unet), RouterConfig()).eval()
    embeddings = torch.randn(1000, 768, generator=torch.Generator().manual_seed(0))
    router.route_embeddings(embeddings)
    seconds = cpu_seconds({"route": lambda: router.route_embeddings(embeddings)}, 5 * rounds)
    return [Figure("routing 1,000 prompts", 1000 * seconds["route"], 50.0, unit="CPU ms")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch", type=int, default=16, help="prompts in a pruning step")
    parser.add_argument("--skip-full-size", action="store_true", help="leave out the 866 M UNet (minutes, 8 GB)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(*(f"{name}: {value}" for name, value in machine().items()), sep=", ")
    calls = step_calls(args.batch)
    figures: list[Figure] = routing(args.rounds)
    details: dict[str, Any] = {}
    timed, details["step_s"] = step_time(calls, args.rounds)
    figures = timed + figures
    if not args.skip_full_size:
        timed, details["full_size"] = full_size(args.rounds)
        figures = timed + figures
    return_freed_memory()
    measured, details["step_bytes"] = step_memory(calls, args.rounds)
    figures += measured
    print_table(figures)
    print(write_results("library", figures, batch_size=args.batch, **details))


if __name__ == "__main__":
    main()
