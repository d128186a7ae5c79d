"""Captioned images become what a stage trains on: latents, text states and sentence embeddings.

The autoencoder and the text encoder are frozen and stay unmodified; both calls mean exactly what diffusers'
`StableDiffusionPipeline` means by them, so that a stage sees in training what sampling will see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a stage is given: `batch` captioned images, row i of each tensor belonging to image i.

    latents: scaled autoencoder latents, of unit variance or so.
    text_states: the text encoder's states of the caption (the UNet's `encoder_hidden_states`).
    embeddings: the prompt encoder's sentence embedding of the SAME caption.
    rows: int64, the identity of each row, from which its noise is drawn (`aptp.noise`): a hash of the image's key, say.
    """

    latents: Float[Tensor, "batch channel height width"]
    text_states: Float[Tensor, "batch token text"]
    embeddings: Float[Tensor, "batch dim"]
    rows: Int[Tensor, " batch"]

    def __post_init__(self) -> None:
        lengths = {name: len(tensor) for name, tensor in vars(self).items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"a Batch needs the same number of rows, at least one, in each tensor; it has {lengths}")

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


@torch.no_grad()
def encode_images(
    vae: Any,
    images: Float[Tensor, "batch 3 image_height image_width"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channel height width"]:
    """Images in [-1, 1] to scaled latents, sampled from the autoencoder's posterior (None: its mode).

    The scaling is the one that the pipeline undoes before decoding: (z - shift_factor) * scaling_factor.
    """
    if images.amin() < -1.001 or images.amax() > 1.001:
        raise ValueError(
            f"images must lie in [-1, 1], these reach from {float(images.amin()):.3g} to {float(images.amax()):.3g}: "
            "divide by 127.5 and subtract 1"
        )
    posterior = vae.encode(images.to(device=vae.device, dtype=vae.dtype)).latent_dist
    sample = posterior.mode() if generator is None else posterior.sample(generator)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (sample - shift) * vae.config.scaling_factor


@torch.no_grad()
def encode_texts(tokenizer: Any, text_encoder: Any, captions: Sequence[str]) -> Float[Tensor, "batch token text"]:
    """Captions to text states, as `StableDiffusionPipeline.encode_prompt` computes them; "" is the null prompt.

    Every caption is padded or truncated to the tokenizer's `model_max_length`. The attention mask is used only where
    the text encoder's config says `use_attention_mask`, as in the pipeline.
    """
    if not captions:
        raise ValueError("encode_texts needs at least one caption, it was given none")
    tokens = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    device = text_encoder.device
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if masked else None
    return text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].to(text_encoder.dtype)
