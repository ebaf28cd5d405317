"""Features of a stream of pictures, the same for every batch size and number of processes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from untwine.encoders.base import Encoder, three_channels
from untwine.encoders.pixels import Pixels
from untwine.evaluation.statistics import Moments, gather


@dataclass(frozen=True)
class Extracted:
    """Features of all pictures of all processes, in the order of their index."""

    pooled: Tensor
    """(N, D) float32"""
    pixels: Tensor
    """(N, P) float32"""
    spatial: Moments
    """of the flattened tokens; empty unless they were wanted"""
    logits: Tensor | None = None
    """(N, K) float32, where they were wanted"""


@dataclass
class Extractor:
    """Encodes 8-bit pictures in chunks of one fixed size, whatever the sizes they come in.

    A convolution rounds differently in batches of another size, so the last chunk is filled up with black pictures:
    a picture's features are bitwise a function of the picture, the encoder and ``batch_size``.
    """

    encoder: Encoder
    batch_size: int = 64
    wanted: Collection[str] = ()
    """``logits`` and ``spatial``, beside the pooled features"""
    count: int = 0
    """pictures of this process so far"""
    _waiting: list[Tensor] = field(default_factory=list)
    _index: list[Tensor] = field(default_factory=list)
    _rows: dict[str, list[Tensor]] = field(default_factory=dict)
    _spatial: Moments = field(default_factory=Moments)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self._pixels = Pixels()

    def update(self, images: Tensor, index: Tensor | None = None) -> None:
        """Adds pictures (B, 3 or 1, H, W) uint8; ``index`` (B,) orders them, by default as they come.

        Raises:
            ValueError: for another shape or dtype, or pictures of another size than before.
        """
        images = three_channels(images).cpu()
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}; Protocol.to_uint8 converts floats")
        if self._waiting and images.shape[1:] != self._waiting[0].shape[1:]:
            raise ValueError(
                f"images must all be of one size, got {tuple(images.shape[2:])} after "
                f"{tuple(self._waiting[0].shape[2:])}"
            )
        self._index.append(torch.arange(self.count, self.count + len(images)) if index is None else index.cpu())
        self.count += len(images)
        waiting = torch.cat([*self._waiting, images])
        full = len(waiting) - len(waiting) % self.batch_size
        for chunk in waiting[:full].split(self.batch_size):
            self._encode(chunk, len(chunk))
        self._waiting = [waiting[full:]]

    def gathered(self) -> Extracted:
        """Everything so far, of all processes; collective.

        Raises:
            ValueError: where two pictures have the same index: processes must share the pictures, not repeat them.
        """
        if self._waiting and (rest := len(self._waiting[0])):
            chunk = self._waiting[0]
            self._encode(torch.cat([chunk, chunk.new_zeros(self.batch_size - rest, *chunk.shape[1:])]), rest)
            self._waiting = [chunk[:0]]
        mine = {name: torch.cat(rows) for name, rows in self._rows.items()}
        parts = [part for part in gather(mine | {"index": torch.cat(self._index)} if mine else {}) if part]
        if not parts:
            raise ValueError("no pictures were given to encode")
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        index = rows.pop("index")
        if len(index.unique()) != len(index):
            raise ValueError("index: two pictures have the same; each process must encode other pictures")
        ordered = {name: values[index.argsort()] for name, values in rows.items()}
        return Extracted(spatial=self._spatial.reduce(), **ordered)

    @torch.inference_mode()
    def _encode(self, chunk: Tensor, count: int) -> None:
        """Features of the first ``count`` pictures of a chunk."""
        device = next((p.device for p in self.encoder.parameters()), chunk.device)
        images = chunk.to(device).float() / 255
        # TensorFloat-32 would cost three digits of every feature.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            found = self.encoder(images)
        rows = {"pooled": found.pooled, "pixels": self._pixels(images).pooled}
        if "logits" in self.wanted:
            if found.logits is None:
                raise ValueError(f"metrics: 'is' needs class scores, and encoder {self.encoder.name} has none")
            rows["logits"] = found.logits
        for name, values in rows.items():
            self._rows.setdefault(name, []).append(values[:count].float().cpu().clone())
        if "spatial" in self.wanted:
            if found.tokens is None:
                raise ValueError(f"metrics: 'sfid' needs a map of features, and encoder {self.encoder.name} has none")
            self._spatial.update(found.tokens[:count].flatten(1))
