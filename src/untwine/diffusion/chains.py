"""Chains of discrete noise levels beside :class:`~untwine.diffusion.paths.DiscretePath`'s."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from untwine.diffusion.paths import Coefficients, Path


@dataclass(frozen=True)
class CosineChain(Path):
    """T levels with ``alpha^2 ~ cos^2((t + s) / (1 + s) pi / 2)`` (Improved DDPM, arXiv 2102.09672, eq. 17).

    Level k sits at ``t = (k + 1) / T``, data at 0; beta is at most 0.999, which bounds the last one.
    """

    num_timesteps: int = 1000
    offset: float = 0.008

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_timesteps < 2 or not 0 < self.offset < 1:
            raise ValueError(f"CosineChain needs num_timesteps >= 2 and offset within (0, 1), got {self}")

    def levels(self, t: Tensor) -> Tensor:
        """The integer level ``k = round(t T) - 1``; -1 is data."""
        return torch.round(t * self.num_timesteps).long() - 1

    def snap(self, t: Tensor) -> Tensor:
        """Up to the next level; uniform times make uniform levels."""
        return torch.ceil(t * self.num_timesteps - 1e-3).clamp(min=1) / self.num_timesteps

    def at(self, t: Tensor) -> Coefficients:
        speed = math.pi / 2 / (1 + self.offset)
        start, before = (math.cos(speed * (place + self.offset)) for place in (0, 1 - 1 / self.num_timesteps))
        angle = (speed * (t.double() + self.offset)).clamp(max=math.acos(1e-3**0.5 * before))
        alpha, d_alpha = angle.cos() / start, -speed * angle.sin() / start
        sigma = (1 - alpha**2).clamp(min=0).sqrt()
        found = alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp(min=1e-6)
        return Coefficients(*(value.to(t.dtype) for value in found))
