"""What every codec offers: samples <-> normalised latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from untwine.diffusion.draws import Draws


@dataclass(frozen=True)
class Encoding:
    """Normalised latents and, where the codec is stochastic, the posterior they were drawn from."""

    latents: Tensor
    """(B, C, *grid) about zero mean and unit deviation"""
    mean: Tensor
    """posterior mean, normalised likewise; the latents themselves for a deterministic codec"""
    std: Tensor | None = None
    """posterior deviation, None for a deterministic codec"""
    side: dict[str, Tensor] = field(default_factory=dict)
    """what :meth:`Codec.decode` needs besides the latents"""


class Codec(ABC):
    """Maps samples (B, C, *grid) to the latents that the backbone sees, and back.

    Normalisation belongs to the codec, and its statistics to the codec's options.
    """

    kinds: ClassVar[str] = "untwine.codecs:CODECS"
    value_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    """of decoded samples"""
    causal_time: ClassVar[bool] = False
    """whether the first frame stands alone, so that 1 + k r frames make 1 + k latent frames"""
    reconstructs: ClassVar[bool] = True
    """whether ``decode(encode(x))`` is meant to give x back"""

    @abstractmethod
    def encode(self, x: Tensor, *, draws: Draws | None = None, index: Tensor | None = None) -> Encoding:
        """Encodes (B, C, *grid) in ``value_range``; a stochastic codec draws row b by (draws, index[b])."""

    @abstractmethod
    def decode(
        self,
        latents: Tensor,
        *,
        side: dict[str, Tensor] | None = None,
        tile: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Decodes latents; ``tile`` (latent pixels) and ``chunk`` (latent frames) bound the memory it takes."""

    @abstractmethod
    def latent_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape (C, *grid) of the latents of one sample."""

    @abstractmethod
    def sample_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The inverse of :meth:`latent_shape`."""
