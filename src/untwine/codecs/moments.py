"""The codec of cached posteriors: its samples are means and deviations that another codec has computed before."""

from __future__ import annotations

from torch import Tensor

from untwine.codecs.base import Codec, Encoding
from untwine.diffusion.draws import Draws


class Moments(Codec):
    """Draws latents from stored posteriors exactly as ``codec`` would from the samples, and decodes as it does.

    Args:
        codec: made the posteriors; only its decoder is used.
        stochastic: samples (B, 2C, *grid) hold the normalised mean and deviation; else (B, C, *grid), the mean alone.
    """

    def __init__(self, codec: Codec, stochastic: bool) -> None:
        self.codec, self.stochastic = codec, stochastic
        self.value_range, self.causal_time = codec.value_range, codec.causal_time  # type: ignore[misc]
        self.reconstructs = codec.reconstructs  # type: ignore[misc]

    def encode(self, x: Tensor, *, draws: Draws | None = None, index: Tensor | None = None) -> Encoding:
        mean, std = x.chunk(2, dim=1) if self.stochastic else (x, None)
        return Encoding.drawn(mean, std, draws, index)

    def decode(
        self,
        latents: Tensor,
        *,
        side: dict[str, Tensor] | None = None,
        tile: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        return self.codec.decode(latents, side=side, tile=tile, chunk=chunk)

    def latent_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (sample_shape[0] // (1 + self.stochastic), *sample_shape[1:])

    def sample_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (latent_shape[0] * (1 + self.stochastic), *latent_shape[1:])

    def decoded_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.codec.decoded_shape(latent_shape)
