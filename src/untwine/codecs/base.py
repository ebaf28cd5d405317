"""What every codec offers: samples <-> normalised latents."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from untwine.diffusion.draws import Draws

logger = logging.getLogger(__name__)


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

    @classmethod
    def drawn(cls, mean: Tensor, std: Tensor | None, draws: Draws | None, index: Tensor | None) -> Encoding:
        """One sample of a Gaussian posterior, row b by (draws, index[b]); its mean where there is nothing to draw."""
        if std is None or draws is None or index is None:
            return cls(mean, mean, std)
        noise = draws.normal("codec/posterior", mean.shape[1:], index, device=mean.device)
        return cls(mean + std * noise, mean, std)


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

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Decoded pictures rounded to 8 bits, (B, C, H, W) uint8; the ends of ``value_range`` are 0 and 255.

        DiT, SiT and DDT round like this; REPA and RAE truncate, half a grey level darker.
        """
        low, high = self.value_range
        unit = ((self.decode(latents).float() - low) / (high - low)).clamp(0, 1)
        return (unit * 255).round().to(torch.uint8)

    @abstractmethod
    def latent_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape (C, *grid) of the latents of one sample."""

    @abstractmethod
    def sample_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The inverse of :meth:`latent_shape`."""

    def decoded_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what :meth:`decode` makes of one latent; other than the samples' for posteriors out of a cache."""
        return self.sample_shape(latent_shape)

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that tell the latents of this codec from another's; a cache of latents is compared by them."""
        options = asdict(self) if is_dataclass(self) else {}
        return {"class": type(self).__name__, **options}


def warn_unless_unit(std: float, source: str) -> None:
    """Warns where latents are far from the unit deviation that noise schedules and losses expect."""
    if not 0.5 <= std <= 2:
        logger.warning(
            "%s have a standard deviation of %.3g, outside 0.5-2: training will be slow or fail; set the codec's mean "
            "and std to those of the latents before normalisation",
            source,
            std,
        )
