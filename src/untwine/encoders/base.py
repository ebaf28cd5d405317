"""What every frozen feature network offers: pictures in, one vector, tokens and class scores out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """What an encoder finds in a batch of pictures."""

    pooled: Tensor
    """(B, D) one vector a picture"""
    tokens: Tensor | None = None
    """(B, N, D') its map, row by row"""
    logits: Tensor | None = None
    """(B, K) scores of its classes"""


class Encoder(nn.Module, ABC):
    """A frozen network: its parameters take no gradient, and it stays in evaluation mode inside a model that trains.

    Gradients still flow to the pictures; wrap calls in ``torch.no_grad()`` where none are wanted.
    """

    kinds: ClassVar[str] = "untwine.encoders:ENCODERS"
    name: str
    """of the network, as results call it"""
    input: str
    """how pictures are resized and normalised"""
    weights_sha256: str | None = None
    """of the weights file; None without one"""
    package: str | None = None
    """distribution that the network's code comes from"""

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Features of pictures (B, 3 or 1, H, W), float in [0, 1]; grey ones are repeated to three channels."""

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever ``mode`` asks for."""
        return super().train(False)

    def freeze(self) -> Self:
        """Evaluation mode, no gradients for parameters; called at the end of a constructor."""
        return self.eval().requires_grad_(False)

    @property
    def id(self) -> str:
        """Name and first digits of the weights' hash, such as ``efflite0-57934424``."""
        return f"{self.name}-{self.weights_sha256[:8]}" if self.weights_sha256 else self.name

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that tell the features of this encoder from another's."""
        return {
            "name": self.name,
            "class": type(self).__name__,
            "input": self.input,
            "weights_sha256": self.weights_sha256,
            "package": f"{self.package} {_version(self.package)}" if self.package else None,
        }


def three_channels(images: Tensor) -> Tensor:
    """(B, 3, H, W) from grey or colour pictures; grey is repeated.

    Raises:
        ValueError: for another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 3, H, W) or grey (B, 1, H, W), got {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


def resize_short_side(images: Tensor, side: int) -> Tensor:
    """Pictures in [0, 1] at a short side of ``side`` pixels: antialiased bicubic (a = -0.5, Pillow's), clipped."""
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = round(height * scale), round(width * scale)
    if size == (height, width):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


def sha256_of(path: Path) -> str:
    """Hexadecimal hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
