"""Latents that no file holds: a window's images are read from the source again and encoded in front of the trainer.

For data too large to be kept as latents beside the images: `encode.cache_latents: false`. Order, captions and
embeddings are those of the encoded rows, so a run is the same but for how a batch rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aptp_platform.config import ConfigError, DataConfig, EncodeConfig, ModelConfig
from aptp_platform.data.captions import read_file
from aptp_platform.data.encode import half_latents
from aptp_platform.data.sample import CaptionedImage, decode_image
from aptp_platform.models import load_vae
from aptp_platform.storage.store import StorageConfig, Store


@dataclass(frozen=True)
class Source:
    """Where the images of encoded rows are. names: the training files, in the order of their places."""

    data: DataConfig
    storage: StorageConfig
    model: ModelConfig
    encode: EncodeConfig
    names: tuple[str, ...]

    def images(self, positions: Sequence[int]) -> dict[int, bytes]:
        """The encoded images of some rows, by position; each file they are in is read once, up to the last of them."""
        found: dict[int, bytes] = {}
        for place in sorted({position >> 32 for position in positions}):
            found |= self._images_of(place, {position for position in positions if position >> 32 == place})
        return found

    def _images_of(self, place: int, wanted: set[int]) -> dict[int, bytes]:
        store, found = Store.open(self.data.source, self.storage), {}
        for position, sample in enumerate(read_file(store, self.names[place]), place << 32):
            if position in wanted and isinstance(sample, CaptionedImage):
                found[position] = sample.image
                if len(found) == len(wanted):
                    return found
        missing = min(wanted - found.keys()) & 0xFFFFFFFF
        raise ConfigError(
            f"data.source: {self.names[place]}: its row {missing} is not what it was when it was encoded: run the "
            "encode job again"
        )

    def pixels(self, image: bytes) -> np.ndarray:
        return decode_image(image, self.data.image_size)


class LatentEncoder:
    """The autoencoder in an actor: rows with pixels become rows with latents."""

    def __init__(self, source: Source) -> None:
        self._vae = load_vae(source.model, source.storage).to("cuda" if source.encode.gpus_per_actor else "cpu")

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        latents = half_latents(self._vae, rows.pop("pixels"))
        return {"latents": latents, **rows}
