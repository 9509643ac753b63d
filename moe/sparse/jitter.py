"""A token's place in the global batch -> the noise on its router's input, the same on every layout.

T tokens, D width. The noise is a function of the seed, the step, the layer, the place and the feature, by an
integer hash, and of no generator: a recomputed, resumed or differently spread step sees what the first one saw.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood 2014): the increment and the two multipliers, as int64.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Jitter:
    """Multiplicative noise for the routers of one micro-batch (arXiv:2101.03961, section 2.2, "input jitter")."""

    epsilon: float
    """Factors are uniform in (1 - epsilon, 1 + epsilon)."""
    keys_T: Tensor
    """int64: a hash of each token's place."""

    @classmethod
    def of(cls, epsilon: float, key: int, places: range, device: torch.device | str = "cpu") -> "Jitter":
        """For the tokens at `places` of the global batch of the step that `key` stands for."""
        return cls(epsilon, element(key, torch.arange(places.start, places.stop, device=device)))

    def part(self, num_sequences: int, positions: slice) -> "Jitter":
        """For some positions of each sequence; the tokens are those of `num_sequences` of equal length."""
        return Jitter(self.epsilon, self.keys_T.view(num_sequences, -1)[:, positions].flatten())

    def of_layer(self, index: int) -> "Jitter":
        """The same tokens in decoder layer `index`."""
        return Jitter(self.epsilon, element(self.keys_T, torch.full_like(self.keys_T, index)))

    def factors(self, width: int, dtype: torch.dtype) -> Tensor:
        """[T, D]: uniform over 2^16 values that lie evenly around 1."""
        quads = torch.arange(-(-width // 4), device=self.keys_T.device)
        hash_TQ = element(self.keys_T.unsqueeze(1), quads)
        # A hash of 64 bits serves four features.
        noise_TD = hash_TQ.view(torch.int16)[:, :width].to(dtype)
        return noise_TD.add_(0.5).mul_(self.epsilon / 2**15).add_(1.0)


def element(seed: Tensor | int, index: Tensor) -> Tensor:
    """Element `index` (from 0) of splitmix64's stream from `seed`; int64, both broadcast; products wrap around."""
    z = (index + 1) * _INCREMENT + seed
    z = z.bitwise_xor_(_shifted(z, 30)).mul_(_MULTIPLIERS[0])
    z = z.bitwise_xor_(_shifted(z, 27)).mul_(_MULTIPLIERS[1])
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Right, filled with zeros; torch's own shift of int64 repeats the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
