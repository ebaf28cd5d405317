"""Rotary position embedding on any number of axes. It takes positions, never a grid.

DDT (arXiv 2504.05741) spreads the tokens of an image over ``linspace(0, 16)`` on each axis, whatever the resolution, so
that a finer grid is a denser sampling of the same range.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""cos and sin, each (B or 1, N, 1, head_dim / 2) float32"""


def image_positions(height: int, width: int, *, extent: float = 16.0, device: torch.device | None = None) -> Tensor:
    """(1, height * width, 2) float32 positions (x, y) of row-major tokens; both ends of [0, extent] are included."""
    x = torch.linspace(0, extent, width, device=device)
    y = torch.linspace(0, extent, height, device=device)
    return torch.stack((x.repeat(height), y.repeat_interleave(width)), -1)[None]


def grid_positions(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """(1, height * width, 2) float32 integer positions (row, column) of row-major tokens."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    return torch.stack((rows.repeat_interleave(width), columns.repeat(height)), -1)[None]


def rope_tables(positions: Tensor, head_dim: int, *, theta: float = 10000.0, interleaved: bool = True) -> Rope:
    """Tables for :func:`rotate`, computed once per forward in float32.

    Frequency k of A axes is ``theta ** (-2 A k / head_dim)``.

    Args:
        positions: (B or 1, N, A); a token at the origin is not rotated.
        head_dim: width of one attention head, divisible by 2 A.
        interleaved: within a frequency the axes follow each other (DDT); else within an axis the frequencies do
            (LightningDiT).

    Raises:
        ValueError: if ``head_dim`` is not divisible by 2 A.
    """
    axes = positions.shape[-1]
    if head_dim % (2 * axes):
        raise ValueError(
            f"head_dim must be divisible by {2 * axes} for rotary positions on {axes} axes, got {head_dim}; "
            "choose hidden_size and num_heads accordingly"
        )
    exponents = torch.arange(0, head_dim, 2 * axes, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[..., None, :] * (1.0 / theta**exponents)[:, None]  # (B, N, head_dim / 2A, A)
    angles = (angles if interleaved else angles.mT).flatten(-2)[:, :, None]  # (B, N, 1, head_dim / 2)
    return angles.cos(), angles.sin()


def with_unrotated(rope: Rope, num_tokens: int, *, before: int = 0) -> Rope:
    """``rope`` with so many tokens more at the end, and ``before`` at the beginning, which are not rotated."""
    cos, sin = rope
    padding = (0, 0, 0, 0, before, num_tokens)
    return F.pad(cos, padding, value=1.0), F.pad(sin, padding)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates consecutive pairs of the (B, N, H, head_dim) queries or keys by their position; computed in float32."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
