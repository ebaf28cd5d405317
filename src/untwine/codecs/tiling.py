"""Decoding in parts, so that memory depends on the part and not on the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Decode = Callable[[Tensor], Tensor]


def decode_tiles(decode: Decode, z: Tensor, tile: int | None) -> Tensor:
    """``decode`` on squares of ``tile`` latent pixels that overlap by a quarter, blended linearly.

    Equal to ``decode(z)`` where the receptive field ends before the overlap does; global attention or normalisation
    makes it an approximation.
    """
    height, width = z.shape[-2:]
    if tile is None or tile >= max(height, width):
        return decode(z)
    if tile < 4:
        raise ValueError(f"tile must be at least 4 latent pixels, got {tile}")
    rows, columns, total, weight = min(tile, height), min(tile, width), None, None
    for top in _starts(height, tile):
        for left in _starts(width, tile):
            part = decode(z[..., top : top + rows, left : left + columns])
            ratio = part.shape[-1] // columns
            if total is None or weight is None:
                total = part.new_zeros((*part.shape[:-2], height * ratio, width * ratio), dtype=torch.float32)
                weight = torch.zeros_like(total[:1, :1])
            ramps = [_ramp(n * ratio, tile // 4 * ratio, part.device) for n in (rows, columns)]
            mask = ramps[0][:, None] * ramps[1]
            y, x = slice(top * ratio, (top + rows) * ratio), slice(left * ratio, (left + columns) * ratio)
            total[..., y, x] += part.float() * mask
            weight[..., y, x] += mask
    return total / weight  # type: ignore[operator]


def decode_frames(decode: Decode, z: Tensor, chunk: int | None) -> Tensor:
    """``decode`` on ``chunk`` frames of (B, C, T, H, W) after another, for decoders that treat each by itself."""
    if chunk is None:
        return decode(z)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 frame, got {chunk}")
    return torch.cat([decode(part) for part in z.split(chunk, dim=2)], dim=2)


def _starts(size: int, tile: int) -> list[int]:
    last = max(size - tile, 0)
    return [*range(0, last, tile - tile // 4), last]


def _ramp(size: int, overlap: int, device: torch.device) -> Tensor:
    """Weights of ``size`` pixels that rise from each end over ``overlap`` of them."""
    place = torch.arange(size, device=device) + 0.5
    return (torch.minimum(place, size - place) / overlap).clamp(max=1)
