"""Random draws as functions of (seed, name, global sample counter).

A draw does not depend on which process, micro-batch or device asks for it, nor on what was drawn before: training on
one process, on many, or resumed in the middle sees the same noise, and image k of a sampling run is the same for every
batch size. The counter-based generator is Philox-4x64 (Salmon et al., SC 2011) as NumPy ships it; draws are made on
the host, because no two devices round the transcendental functions behind a normal draw alike, and then moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Streams of random numbers under one seed.

    Args:
        seed: any integer in [0, 2**64).
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
        self.seed = seed

    def __repr__(self) -> str:
        return f"Draws(seed={self.seed})"

    def normal(
        self,
        name: str,
        shape: Sequence[int],
        index: Tensor | Sequence[int],
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Standard normal draws (B, *shape) float32: row b is a function of (seed, name, index[b]) alone."""
        return self._rows(name, shape, index, device, "normal")

    def uniform(
        self,
        name: str,
        shape: Sequence[int],
        index: Tensor | Sequence[int],
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws from [0, 1), (B, *shape) float32: row b is a function of (seed, name, index[b]) alone."""
        return self._rows(name, shape, index, device, "uniform")

    def shared(self, name: str, step: int) -> float:
        """One value in [0, 1) of a training step, the same on every rank."""
        return float(self.uniform(f"shared/{name}", (), [step])[0])

    def permutation(self, name: str, size: int, epoch: int) -> np.ndarray:
        """A permutation of ``range(size)`` as a function of (seed, name, epoch)."""
        generator = self._generator(f"permutation/{name}")
        _seek(generator, epoch)
        return generator.permutation(size)

    def _rows(
        self,
        name: str,
        shape: Sequence[int],
        index: Tensor | Sequence[int],
        device: torch.device | str | None,
        kind: str,
    ) -> Tensor:
        rows = index.tolist() if isinstance(index, Tensor) else [int(i) for i in index]
        if any(i < 0 for i in rows):
            raise ValueError(f"index must hold sample counters >= 0, got {min(rows)}")
        generator = self._generator(name)
        out = np.empty((len(rows), *shape), dtype=np.float32)
        for row, i in zip(out.reshape(len(rows), -1), rows):
            _seek(generator, i)
            if kind == "normal":
                generator.standard_normal(dtype=np.float32, out=row)
            else:
                generator.random(dtype=np.float32, out=row)
        return torch.from_numpy(out).to(device or "cpu")

    def _generator(self, name: str) -> np.random.Generator:
        stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        bits = np.random.Philox(key=np.array([self.seed, stream], dtype=np.uint64))
        return np.random.Generator(bits)


def _seek(generator: np.random.Generator, counter: int) -> None:
    """Moves to the start of one sample's own 2**128 blocks of the stream."""
    state: Any = generator.bit_generator.state
    state["state"]["counter"][:] = (0, 0, counter, 0)
    state["buffer_pos"] = 4
    state["has_uint32"] = 0
    generator.bit_generator.state = state
