"""Prompts become sentence embeddings z: a frozen sentence transformer with mean pooling.

The paper uses all-mpnet-base-v2 (768-d) without its final normalisation; any encoder of that family will do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

_GROUP_SIZE: Final = 64  # rows of one forward pass: enough to fill a core, small enough for a laptop


class PromptEncoder(nn.Module):
    """A frozen sentence encoder: `encode(prompts)` is the same for a prompt whoever shares its batch.

    Prompts are grouped by their length in tokens, so that no row is ever padded: the result depends on the batch only
    through the rounding of the matrix product (about 1e-6). Of a prompt longer than `max_tokens` nothing is ignored: it
    is encoded in windows, and its embedding is the mean over all their tokens.
    """

    tokenizer: Any
    model: Any

    def __init__(self, tokenizer: Any, model: nn.Module, *, max_tokens: int = 128) -> None:
        super().__init__()
        limit = getattr(model.config, "max_position_embeddings", max_tokens)
        if not 2 < max_tokens <= limit:
            raise ValueError(f"max_tokens must be in 3..{limit} (the encoder's positions), it is {max_tokens}")
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, path: Path | str, *, max_tokens: int = 128) -> "PromptEncoder":
        """The encoder stored in a transformers folder (config.json, model.safetensors, the tokenizer's files).

        Raises:
            ValueError: a file is missing or damaged, or the weights lack a tensor that the encoder has.
        """
        from transformers import AutoModel, AutoTokenizer  # here: training routes embeddings, and needs no encoder

        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json: a prompt encoder is a folder as transformers saves it")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model, found = AutoModel.from_pretrained(
                path, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: does not load as a prompt encoder ({reason}): copy or save it again") from None
        missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))  # which is not read
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{path}: its weights lack {missing[0]}{more}, which a {type(model).__name__} has; it would be made "
                "up: copy or save the encoder again"
            )
        return cls(tokenizer, model, max_tokens=max_tokens)

    def save(self, path: Path | str) -> None:
        self.tokenizer.save_pretrained(path)
        self.model.save_pretrained(path, safe_serialization=True)

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    def train(self, mode: bool = True) -> "PromptEncoder":
        """Stays in evaluation mode: a frozen encoder has no dropout."""
        return super().train(False)

    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Sentence embeddings, fp32, not normalised. An empty prompt is legal; a missing one is not."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"encode needs a non-empty sequence of strings, it was given {prompts!r}")
        windows, owners = self._windows(prompts)
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(windows):
            by_length.setdefault(len(row), []).append(index)
        device = next(self.model.parameters()).device
        sums = torch.zeros(len(prompts), self.dim, device=device)
        tokens = torch.zeros(len(prompts), 1, device=device)
        for length, indices in by_length.items():
            for start in range(0, len(indices), _GROUP_SIZE):
                group = indices[start : start + _GROUP_SIZE]
                ids = torch.tensor([windows[index] for index in group], device=device)
                with torch.inference_mode():
                    pooled = self.model(input_ids=ids)[0].mean(1)  # of one length, so nothing is padding
                prompt = torch.tensor([owners[index] for index in group], device=device)
                sums.index_add_(0, prompt, length * pooled.float())
                tokens.index_add_(0, prompt, tokens.new_full((len(group), 1), length))
        return sums / tokens

    def _windows(self, prompts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids of at most `max_tokens` each, special tokens included, and the prompt that each is of."""
        tokens = self.tokenizer(
            list(prompts), truncation=True, max_length=self.max_tokens, return_overflowing_tokens=True
        )
        return tokens["input_ids"], tokens["overflow_to_sample_mapping"]
