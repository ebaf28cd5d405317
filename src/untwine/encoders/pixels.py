"""Encoders without weights: the pixels themselves, and any function."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from untwine.encoders.base import Encoder, Features, three_channels


class Pixels(Encoder):
    """Flattened pixels of pictures averaged down to at most ``side`` x ``side``.

    Args:
        side: of the averaged picture; smaller pictures are left as they are.
    """

    name = "pixels"

    def __init__(self, side: int = 16) -> None:
        super().__init__()
        if side < 1:
            raise ValueError(f"side must be at least 1, got {side}")
        self.side = side
        self.input = f"area average to at most {side} x {side}, [0, 1]"

    def forward(self, images: Tensor) -> Features:
        images = three_channels(images)
        size = tuple(min(length, self.side) for length in images.shape[-2:])
        small = images if size == images.shape[-2:] else F.interpolate(images, size, mode="area")
        return Features(small.flatten(1), small.flatten(2).transpose(1, 2))


class AnyEncoder(Encoder):
    """The seam for any extractor: a function of pictures (B, 3, H, W) in [0, 1].

    Args:
        function: returns the pooled features (B, D), or :class:`~untwine.encoders.base.Features`.
        name: what results call it; caches of reference features are told apart by it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor | Features], name: str) -> None:
        super().__init__()
        self.function, self.name, self.input = function, name, "as the function does"
        self.freeze()

    def forward(self, images: Tensor) -> Features:
        found = self.function(three_channels(images))
        return found if isinstance(found, Features) else Features(found)
