"""CacheQuant's decoupled error correction (arXiv 2503.01323): per-channel maps ``a x + b``.

One rule serves both errors. Of caching: x is the value of the group's first step, y that of a later step. Of
quantization: x is the quantized output, y the exact one; there the map is folded into the layer.

Differs from the reference (github.com/BienLuky/CacheQuant): a channel without variance keeps a = 1; the folded bias is
``a bias + b``, where the reference drops ``a bias``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Affinity(NamedTuple):
    """``a x + b`` for every step and channel."""

    a: Tensor
    """(S, C)"""
    b: Tensor
    """(S, C)"""

    def apply(self, x: Tensor, step: int) -> Tensor:
        """``x`` (..., C) corrected for ``step``, in its own dtype."""
        return torch.addcmul(self.b[step].to(x.device), self.a[step].to(x.device), x.float()).to(x.dtype)


@dataclass
class Sums:
    """Streaming moments of pairs (x, y), both (..., C), for a least-squares line per channel; in float64."""

    count: int = 0
    moments: Tensor | float = 0.0
    """(4, C): sums of x, y, x x, x y"""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in more pairs."""
        if x.shape != y.shape:
            raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        x, y = (value.detach().double().flatten(0, -2) for value in (x, y))
        self.count += len(x)
        self.moments = self.moments + torch.stack([part.sum(0) for part in (x, y, x * x, x * y)])

    def fit(self) -> tuple[Tensor, Tensor]:
        """``a = Cov(y, x) / Var(x)`` and ``b = mean(y) - a mean(x)``, both (C,) float32.

        As published the covariance is divided by n and the variance by n - 1. A channel of constant x has a = 1.
        """
        if self.count < 2:
            raise ValueError(f"a fit needs at least 2 values a channel, got {self.count}")
        mean_x, mean_y, xx, xy = torch.as_tensor(self.moments) / self.count
        covariance = xy - mean_x * mean_y
        variance = (xx - mean_x**2) * self.count / (self.count - 1)
        dead = variance <= 1e-12 * xx
        a = torch.where(dead, 1.0, covariance / torch.where(dead, 1.0, variance))
        return a.float(), (mean_y - a * mean_x).float()


def fit_affine(y: Tensor, y_q: Tensor) -> tuple[Tensor, Tensor]:
    """The (C,) tables a, b with which ``a y_q + b`` is closest to ``y``, both (..., C); see :meth:`Sums.fit`."""
    sums = Sums()
    sums.add(y_q, y)
    return sums.fit()


def fold(weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, ...) and bias (C,) of the layer that gives ``a (weight x + bias) + b`` at once; exact."""
    scaled = weight * a.view(-1, *[1] * (weight.ndim - 1))
    return scaled, b if bias is None else a * bias + b
