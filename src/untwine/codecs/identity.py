"""The codec of pixel-space models: an affine map and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from untwine.codecs.base import Codec, Encoding
from untwine.diffusion.draws import Draws


@dataclass(frozen=True)
class IdentityCodec(Codec):
    """``latents = (x - shift) * scale``. It needs neither tiles nor chunks: decoding allocates one tensor.

    Raises:
        ValueError: for a scale of zero or values that are not finite.
    """

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift must be finite, got {self.shift}")

    def encode(self, x: Tensor, *, draws: Draws | None = None, index: Tensor | None = None) -> Encoding:
        latents = (x - self.shift) * self.scale
        return Encoding(latents, mean=latents)

    def decode(
        self,
        latents: Tensor,
        *,
        side: dict[str, Tensor] | None = None,
        tile: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        return latents / self.scale + self.shift

    def latent_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sample_shape)

    def sample_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(latent_shape)
