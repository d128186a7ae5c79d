"""`aptp`: what a release holds, and images from it, on the command line.

aptp inspect RELEASE
aptp draw RELEASE "fluent emoji of red apple" --seed 7 --output apple.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import aptp
from aptp.release import Release, read_release


def describe(release: Release) -> str:
    """What a release says of itself: its base and budget, then one line a code."""
    lines = [
        f"base {release.info.base}, latents {release.info.latent_size[0]} x {release.info.latent_size[1]}, "
        f"{release.info.num_text_tokens} text tokens",
        f"{release.num_codes} codes, budget {release.info.budget:.2f}, mean MACs ratio {release.ratio:.2f}, "
        f"{'with' if release.teacher_path else 'without'} the teacher",
        "code   MACs ratio   M MACs   M parameters   share of prompts",
    ]
    lines += [
        f"{index:4}   {code.ratio:10.2f}   {code.macs / 1e6:6.0f}   {code.params / 1e6:12.2f}   {code.share:16.2f}"
        for index, code in enumerate(release.codes)
    ]
    return "\n".join(lines)


def draw(folder: Path, prompt: str, output: Path, *, seed: int, steps: int, guidance: float, device: str) -> str:
    """Writes one image; says which code made it, and at which share of the full model's multiply-adds."""
    from aptp.pipeline import AptpPipeline  # `inspect` needs no torch

    pipeline = AptpPipeline.from_release(folder, device=device)
    made = pipeline(prompt, seeds=[seed], num_inference_steps=steps, guidance_scale=guidance)
    made.images[0].save(output)
    code = int(made.routes.indices[0])
    return f"{output}: code {code}, {pipeline.release.codes[code].ratio:.2f} of the full model's multiply-adds"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="aptp", description="Releases of prompt-tailored experts.")
    parser.add_argument("--version", action="version", version=f"aptp {aptp.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="check every file of a release and say what it holds")
    drawing = commands.add_parser("draw", help="make one image with the expert that the router chooses")
    for command in (inspect, drawing):
        command.add_argument("release", type=Path, help="a local release folder")
    drawing.add_argument("prompt")
    drawing.add_argument("--output", type=Path, default=Path("image.png"))
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--steps", type=int, default=25)
    drawing.add_argument("--guidance", type=float, default=7.5)
    drawing.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    given = parser.parse_args(arguments)
    try:
        if given.command == "inspect":
            print(describe(read_release(given.release)))
        else:
            options = {"seed": given.seed, "steps": given.steps, "guidance": given.guidance, "device": given.device}
            print(draw(given.release, given.prompt, given.output, **options))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
