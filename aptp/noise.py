"""Random numbers of a training step as functions of (seed, step, row, use): the same on every device, for every number
of workers, and wherever in a batch a row stands.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which has no state:
ten rounds turn a counter of four 32-bit words and a key of two into four random words.

    key      64 bits of SHA-256(seed, use)
    counter  (number of the block of four words, step, lower and upper half of the row)

It is written in integer operations of torch, so it runs where `rows` are and nothing is copied there. Uniform numbers
and integers are equal bit for bit on all devices, normal and Gumbel numbers up to how a device rounds log and cos.
"""

import hashlib
from dataclasses import dataclass, replace
from math import pi, prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, as Weyl sequences
_ROUNDS = 10

Word = int | Int[Tensor, "..."]


@dataclass(frozen=True)
class Noise:
    """Random numbers of one training step: functions of (seed, step, row, use).

    Two draws need two uses: with one use, one of them is the other's beginning.

    Attributes:
        step: below 2**32; as an int64 0-d tensor on the device of `rows` it can change under a captured CUDA graph.
        rows: int64, the identity of each row, such as a 63-bit hash of its key. The numbers are drawn on its device.
    """

    seed: int
    step: int | Int[Tensor, ""]
    rows: Int[Tensor, " row"]

    def of(self, rows: Int[Tensor, " row"]) -> "Noise":
        """The same seed and step for other rows: `torch.arange(K)` for the codes, whose noise all workers share."""
        return replace(self, rows=rows)

    def uniform(self, *shape: int, use: str) -> Float[Tensor, "row ..."]:
        """In (0, 1), odd multiples of 2**-24."""
        return _between(self._words(prod(shape), use)).view(len(self.rows), *shape)

    def normal(self, *shape: int, use: str) -> Float[Tensor, "row ..."]:
        """Standard normal, by Box and Muller: at most 5.8 in size."""
        count = prod(shape)
        first, second = self.uniform((count + 1) // 2, 2, use=use).unbind(2)
        radius, angle = torch.sqrt(-2 * torch.log(first)), 2 * pi * second
        pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 2)
        return pairs.flatten(1)[:, :count].reshape(len(self.rows), *shape)

    def gumbel(self, *shape: int, use: str) -> Float[Tensor, "row ..."]:
        """Standard Gumbel, -ln(-ln u)."""
        return -torch.log(-torch.log(self.uniform(*shape, use=use)))

    def integers(self, high: int, use: str) -> Int[Tensor, " row"]:
        """One of 0..high-1 for each row; high is at most 2**31."""
        return self._words(1, use)[:, 0] * high >> 32

    def _words(self, count: int, use: str) -> Int[Tensor, "row {count}"]:
        digest = hashlib.sha256(f"{self.seed}/{use}".encode()).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        blocks = torch.arange((count + 3) // 4, device=self.rows.device)
        rows = self.rows[:, None]
        words = philox((blocks, self.step & _WORD, rows & _WORD, rows >> 32 & _WORD), key)
        return torch.stack(torch.broadcast_tensors(*words), 2).flatten(1)[:, :count]


def philox(
    counter: tuple[Int[Tensor, "..."], Word, Int[Tensor, "..."], Word], key: tuple[int, int]
) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."]]:
    """Philox4x32-10. Words are int64 from 0 to 2**32-1, and broadcast."""
    a, b, c, d = counter
    for i in range(_ROUNDS):
        left, right = ((word + i * step) & _WORD for word, step in zip(key, _KEY_STEPS, strict=True))
        # A product's 64 bits are right, though int64 takes them for a negative number: hence the mask after the shift.
        low, high = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (high >> 32 ^ b ^ left) & _WORD, high & _WORD, (low >> 32 ^ d ^ right) & _WORD, low & _WORD
    assert isinstance(b, Tensor)
    assert isinstance(d, Tensor)
    return a, b, c, d


def _between(words: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Words as numbers in (0, 1), never 0 or 1: the middles of 2**23 equal parts, which fp32 holds exactly."""
    return ((words >> 9).float() + 0.5) * 2.0**-23


def sample_noise(
    latents: Float[Tensor, "batch channel height width"], num_timesteps: int, noise: Noise
) -> tuple[Float[Tensor, "batch channel height width"], Int[Tensor, " batch"]]:
    """Noise like the latents ("noise") and timesteps uniform in 0..num_timesteps-1 ("timesteps")."""
    drawn = noise.normal(*latents.shape[1:], use="noise")
    return drawn.to(latents.dtype), noise.integers(num_timesteps, use="timesteps")
