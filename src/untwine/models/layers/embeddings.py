"""Patches, time and labels as tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from untwine.models.layers.basic import Linear


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C * p * p) in the order of ``F.unfold``: channel, patch row, patch column."""
    batch, channels, height, width = x.shape
    p = patch_size
    x = x.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify` for samples of ``size`` (H, W)."""
    rows, columns, p = size[0] // patch_size, size[1] // patch_size, patch_size
    x = tokens.reshape(tokens.shape[0], rows, columns, -1, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, *size)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches projected to the model width."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(in_channels * patch_size**2, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weight, bias 0."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.proj(patchify(x, self.patch_size))


def sinusoid(t: Tensor, dim: int, *, max_period: float) -> Tensor:
    """(...,) -> (..., dim) float32: ``dim // 2`` cosines, as many sines, and a zero when ``dim`` is odd.

    The frequencies fall geometrically from 1 to ``1 / max_period`` (exclusive).
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[..., None] * torch.exp(-math.log(max_period) * steps / half)
    return nn.functional.pad(torch.cat((angles.cos(), angles.sin()), -1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """MLP over the sinusoid of ``time_scale * (t - time_origin)``.

    The argument and the sinusoid are a float32 island. With origin 1 the argument is minus the time of a model trained
    with data at t = 1: the cosines agree, the sines change sign, and a converter negates their weights.
    """

    def __init__(
        self, hidden_size: int, *, scale: float, origin: float, max_period: float, frequency_dim: int = 256
    ) -> None:
        super().__init__()
        self.scale, self.origin, self.max_period, self.frequency_dim = scale, origin, max_period, frequency_dim
        self.mlp = nn.Sequential(Linear(frequency_dim, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of deviation 0.02; the biases keep the default of a linear layer."""
        for layer in self.mlp:
            if isinstance(layer, Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, 1, D), or (B, N) -> (B, N, D): one time per sample or per token."""
        time = self.scale * (t.float() - self.origin)
        hidden = self.mlp(sinusoid(time, self.frequency_dim, max_period=self.max_period))
        return hidden[:, None] if t.ndim == 1 else hidden


class LabelEmbedding(nn.Module):
    """A table of class vectors whose last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal rows of deviation 0.02."""
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int64 -> (B, 1, D)."""
        return self.table(labels)[:, None]
