"""Single denoising steps for samples that each have their own timestep, scheduler, guidance, size and seed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from aptp.latents import encode_texts
from aptp.losses import check_scheduler
from aptp_platform.serve.engine.repaint import Kept, start_from
from aptp_platform.serve.messages import SourceImage

_CACHED_TEXTS: Final = 128  # text states kept; the empty negative prompt is nearly always among them


@dataclass(frozen=True)
class SampleSpec:
    """One image that is wanted. size: (width, height) in pixels. num_previews: unfinished pictures on the way. source:
    what it starts from, of that size."""

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    size: tuple[int, int]
    negative_prompt: str = ""
    num_previews: int = 0
    source: SourceImage | None = None


class Sample:
    """A spec on its way: the state that a denoising step reads and advances."""

    def __init__(
        self,
        spec: SampleSpec,
        scheduler: Any,
        generator: torch.Generator,
        latents: Float[Tensor, "1 channel height width"],
        text: Float[Tensor, "1 token dim"],
        negative: Float[Tensor, "1 token dim"] | None,
        timesteps: Sequence[Tensor],
        kept: Kept | None = None,
    ) -> None:
        self.spec, self.latents, self.text, self.negative = spec, latents, text, negative
        self._scheduler, self._generator = scheduler, generator
        self._timesteps, self._kept = timesteps, kept
        self._estimate = latents
        self.steps_done = self._previews_done = 0

    @property
    def steps_left(self) -> int:
        return len(self._timesteps) - self.steps_done

    @property
    def timestep(self) -> Tensor:
        return self._timesteps[self.steps_done]

    @property
    def scaled(self) -> Float[Tensor, "1 channel height width"]:
        """The latents as this scheduler wants the UNet to see them."""
        return self._scheduler.scale_model_input(self.latents, self.timestep)

    @property
    def estimate(self) -> Float[Tensor, "1 channel height width"]:
        """The finished latents as they can be told by now."""
        return self._estimate if self.steps_left else self.latents

    def advance(self, prediction: Float[Tensor, "1 channel height width"]) -> None:
        """One step of the stock scheduler from the UNet's prediction, guidance included."""
        given = {"generator": self._generator, "eta": 0.0}  # as the stock pipeline gives them
        options = {name: value for name, value in given.items() if _takes(self._scheduler, name)}
        result = self._scheduler.step(prediction, self.timestep, self.latents, **options)
        self.latents = result.prev_sample
        if self._kept is not None:
            following = self._timesteps[self.steps_done + 1] if self.steps_left > 1 else None
            self.latents = self._kept.restore(self.latents, self._scheduler, following)
        estimate = getattr(result, "pred_original_sample", None)
        self._estimate = self.latents if estimate is None else estimate
        self.steps_done += 1

    def take_preview(self) -> int | None:
        """The number of the preview that is due after the last step, or None; previews are spread evenly."""
        wanted, total = self.spec.num_previews, len(self._timesteps)
        due = min(wanted, self.steps_done * (wanted + 1) // total)
        if not self.steps_left or due <= self._previews_done:
            return None
        self._previews_done = due
        return due - 1


class NotFiniteError(RuntimeError):
    """A picture whose pixels are infinite or no numbers."""

    def __init__(self, steps_done: int) -> None:
        super().__init__(f"the picture's numbers are not finite after {steps_done} steps")


class Denoiser:
    """A UNet with the frozen parts around it; every method runs on the calling thread and blocks it. All but
    `count_tokens` want to be called on one thread.

    The UNet may be the teacher or an expert: whatever has a stock `UNet2DConditionModel`'s call.
    """

    def __init__(self, unet: Any, vae: Any, tokenizer: Any, text_encoder: Any, scheduler: Any) -> None:
        check_scheduler(scheduler)
        self._unet, self._vae, self._scheduler = unet, vae, scheduler
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self._counter = copy.deepcopy(tokenizer)  # a call changes a tokenizer, and `count_tokens` comes on any thread
        # Asked for one of these, a diffusers model looks through all its modules.
        self._dtype, self._device, self._vae_dtype = unet.dtype, unet.device, vae.dtype
        self._texts: OrderedDict[str, Float[Tensor, "1 token dim"]] = OrderedDict()
        self.pixels_per_latent = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.inference_mode()
    def admit(self, specs: Sequence[SampleSpec]) -> list[Sample | Exception]:
        """Samples at their first step: initial noise from each seed, text states of each prompt.

        The noise is the stock pipeline's for `torch.Generator().manual_seed(seed)`. What the scheduler or torch has
        against one spec comes back in its place, and concerns no other.
        """
        guided = [spec for spec in specs if spec.guidance_scale > 1]
        texts = self._encode([spec.prompt for spec in specs] + [spec.negative_prompt for spec in guided])
        samples: list[Sample | Exception] = []
        for spec in specs:
            try:
                samples.append(self._start(spec, texts))
            except Exception as error:
                samples.append(error)
        return samples

    def _start(self, spec: SampleSpec, texts: Mapping[str, Float[Tensor, "1 token dim"]]) -> Sample:
        generator = torch.Generator().manual_seed(spec.seed)
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(spec.num_inference_steps, device=self._device)
        kept = None
        if spec.source is None:
            width, height = (side // self.pixels_per_latent for side in spec.size)
            noise = torch.randn(1, self._unet.config.in_channels, height, width, generator=generator)
            latents, timesteps = noise.to(self._device) * scheduler.init_noise_sigma, list(scheduler.timesteps)
        else:
            latents, timesteps, kept = start_from(
                spec.source, spec.size, spec.num_inference_steps, scheduler, self._vae, generator
            )
        negative = texts[spec.negative_prompt] if spec.guidance_scale > 1 else None
        return Sample(spec, scheduler, generator, latents, texts[spec.prompt], negative, timesteps, kept)

    @torch.inference_mode()
    def step(self, samples: Sequence[Sample]) -> None:
        """One denoising step of each sample; those of one size share a pass through the UNet."""
        for group in _by_size(samples):
            guided = [index for index, sample in enumerate(group) if sample.negative is not None]
            texts = [sample.text for sample in group] + [each.negative for each in group if each.negative is not None]
            rows = [*range(len(group)), *guided]
            scaled = torch.cat([sample.scaled for sample in group])
            timesteps = torch.stack([sample.timestep for sample in group])
            states = torch.cat(texts).to(self._dtype)
            output = self._unet(scaled[rows].to(self._dtype), timesteps[rows], states).sample.float()
            predictions = output[: len(group)]
            scales = torch.tensor([group[index].spec.guidance_scale for index in guided], device=output.device)
            free = output[len(group) :]
            predictions[guided] = free + scales.view(-1, 1, 1, 1) * (predictions[guided] - free)
            for index, sample in enumerate(group):
                sample.advance(predictions[index : index + 1])

    @torch.inference_mode()
    def decode(self, samples: Sequence[Sample]) -> list[UInt8[Tensor, "height width 3"] | NotFiniteError]:
        """The samples' images as far as they are, in the given order; an error in the place of one without numbers."""
        images: dict[int, UInt8[Tensor, "height width 3"] | NotFiniteError] = {}
        config = self._vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        for group in _by_size(samples):
            latents = torch.cat([sample.estimate for sample in group]) / config.scaling_factor + shift
            decoded = self._vae.decode(latents.to(self._vae_dtype)).sample.float()
            finite = decoded.isfinite().flatten(1).all(1).tolist()  # else uint8 makes a black image of them
            pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().to("cpu", torch.uint8)
            for sample, image, shown in zip(group, pixels, finite, strict=True):
                images[id(sample)] = image if shown else NotFiniteError(sample.steps_done)
        return [images[id(sample)] for sample in samples]

    def count_tokens(self, prompt: str) -> int:
        """How many tokens of the prompt the text encoder reads."""
        limit = self._counter.model_max_length
        return len(self._counter(prompt, truncation=True, max_length=limit)["input_ids"])

    def _encode(self, texts: Iterable[str]) -> dict[str, Float[Tensor, "1 token dim"]]:
        wanted = list(dict.fromkeys(texts))
        found = {text: self._texts[text] for text in wanted if text in self._texts}
        missing = [text for text in wanted if text not in found]
        if missing:
            states = encode_texts(self._tokenizer, self._text_encoder, missing)
            found.update((text, states[index : index + 1]) for index, text in enumerate(missing))
        for text in wanted:
            self._texts[text] = found[text]
            self._texts.move_to_end(text)
        while len(self._texts) > _CACHED_TEXTS:
            self._texts.popitem(last=False)
        return found


def _by_size(samples: Sequence[Sample]) -> list[list[Sample]]:
    ordered = sorted(samples, key=lambda sample: sample.spec.size)
    return [list(group) for _, group in groupby(ordered, key=lambda sample: sample.spec.size)]


def _takes(scheduler: Any, option: str) -> bool:
    return option in scheduler.step.__code__.co_varnames[: scheduler.step.__code__.co_argcount]
