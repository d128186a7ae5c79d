"""Prompts to images with a release: route, group by code, generate each group with its expert.

Generation is the stock `StableDiffusionPipeline` with the expert as its UNet. Every image has its own seed, so that it
does not depend on who shares its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL.Image import Image
from torch import nn

from aptp.expert import load_expert
from aptp.release import Release, read_release
from aptp.router import Router
from aptp.routes import Routes


@dataclass(frozen=True)
class AptpOutput:
    """Image i was made for prompt i by code routes.indices[i] from seeds[i]."""

    images: list[Image]
    routes: Routes
    seeds: tuple[int, ...]


class AptpPipeline:
    """A release, ready to generate. Experts are loaded when first used and kept."""

    def __init__(
        self, release: Release, router: Router, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.release, self.router = release, router
        self._device, self._dtype = device, dtype
        self._unets: dict[int | None, nn.Module] = {}
        stock = StableDiffusionPipeline.from_pretrained(
            release.pipeline_path,
            unet=self.expert(0),
            safety_checker=None,
            requires_safety_checker=False,
            use_safetensors=True,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,  # True needs `accelerate`, and warns at length without it
        ).to(device)
        stock.set_progress_bar_config(disable=True)
        self._stock = stock

    @classmethod
    def from_release(
        cls, path: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, verify: bool = True
    ) -> "AptpPipeline":
        """The pipeline of a local release folder, whose files are first checked against their hashes."""
        release = read_release(path, verify=verify)
        return cls(release, Router.load(release.router_path), device=device, dtype=dtype)

    def expert(self, index: int) -> nn.Module:
        """The UNet of a code."""
        if not 0 <= index < self.release.num_codes:
            raise ValueError(f"code {index} does not exist: the release has codes 0..{self.release.num_codes - 1}")
        return self._load(index, lambda: load_expert(self.release.expert_path(index)))

    @property
    def teacher(self) -> nn.Module | None:
        """The full UNet, or None if it was not published with the release."""
        path = self.release.teacher_path
        if path is None:
            return None
        return self._load(
            None,
            lambda: UNet2DConditionModel.from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False),
        )

    def _load(self, key: int | None, load: Callable[[], nn.Module]) -> nn.Module:
        if key not in self._unets:
            self._unets[key] = load().to(self._device, self._dtype).eval()
        return self._unets[key]

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 8,
        use_teacher: bool = False,
        **options: Any,
    ) -> AptpOutput:
        """One image a prompt. seeds: one a prompt; else drawn from `generator`, or from torch's own.

        use_teacher: the full UNet makes every image (the routes are given all the same). Other options go to the stock
        pipeline (height, width, guidance_rescale, ...).

        Raises:
            FloatingPointError: an image is not made of numbers.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("there must be at least one prompt, none was given")
        seeds = self._seeds(len(prompts), seeds, generator)
        routes = self.router.route(prompts)
        if use_teacher and self.teacher is None:
            raise ValueError(f"{self.release.path} was published without its teacher: publish with with_teacher=True")
        images: list[Any] = [None] * len(prompts)
        for code in range(1 if use_teacher else self.release.num_codes):
            rows = [i for i in range(len(prompts)) if use_teacher or int(routes.indices[i]) == code]
            for start in range(0, len(rows), batch_size):
                group = rows[start : start + batch_size]
                self._stock.unet = self.teacher if use_teacher else self.expert(code)
                made = self._generate(
                    [prompts[i] for i in group],
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    negative_prompt=None if negative_prompt is None else [negative_prompt] * len(group),
                    generator=[torch.Generator("cpu").manual_seed(seeds[i]) for i in group],
                    **options,
                )
                for i, image in zip(group, made, strict=True):
                    images[i] = image
        return AptpOutput(images, routes, seeds)

    def _generate(self, prompts: list[str], output_type: str = "pil", **options: Any) -> Any:
        """The stock pipeline's images. Its own conversion to a picture makes black of what is no number."""
        made = self._stock(prompts, output_type="np" if output_type == "pil" else output_type, **options).images
        finite = np.isfinite(made).all() if isinstance(made, np.ndarray) else torch.isfinite(made).all()
        if not finite:
            raise FloatingPointError(
                f"an image of {prompts} holds numbers that are not finite: try float32, less guidance, other schedulers"
            )
        return self._stock.image_processor.numpy_to_pil(made) if output_type == "pil" else made

    @staticmethod
    def _seeds(count: int, seeds: Sequence[int] | None, generator: torch.Generator | None) -> tuple[int, ...]:
        if seeds is None:
            drawn = torch.randint(2**31, (count,), generator=generator)
            return tuple(int(seed) for seed in drawn)
        if len(seeds) != count or generator is not None:
            raise ValueError(f"give one seed a prompt or a generator: {count} prompts, {len(seeds)} seeds")
        return tuple(seeds)
