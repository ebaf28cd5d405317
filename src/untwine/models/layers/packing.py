"""Joint samples as one tensor, so that paths, solvers, guidance and losses need not know of their parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Tensors of the given shapes (without the batch) side by side in one sample (B, 1, L)."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def length(self) -> int:
        """L"""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Parts (B, *shape) -> (B, 1, L)."""
        if parts.keys() != self.shapes.keys():
            raise ValueError(f"parts must be {list(self.shapes)}, got {list(parts)}")
        return torch.cat([parts[name].flatten(1) for name in self.shapes], 1)[:, None]

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`pack`."""
        if x.ndim != 3 or x.shape[1:] != (1, self.length):
            raise ValueError(f"x must be (B, 1, {self.length}) for parts {dict(self.shapes)}, got {tuple(x.shape)}")
        flat = x[:, 0].split([math.prod(shape) for shape in self.shapes.values()], 1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), flat)}

    def expand(self, values: Mapping[str, Tensor]) -> Tensor:
        """One number (B,) a part -> (B, 1, L): times or weights that differ between parts."""
        return self.pack({k: values[k].view(-1, *[1] * len(s)).expand(-1, *s) for k, s in self.shapes.items()})
