"""Forecasts of what an encoder would say, from what it said at its last refreshes.

DDT's decoder modulations are affine in the encoder state. Lagrange weights sum to 1, so the same weights applied to the
cached modulations give exactly the modulations of the extrapolated state, and a reused step needs no projection: one
pass over the cache takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def lagrange_weights(nodes: Sequence[float], u: float) -> list[float]:
    """Weights, summing to 1, of values at ``nodes`` in the value at ``u`` of the polynomial through them.

    ``w_j = prod_{m != j} (u - u_m) / (u_j - u_m)``; the nodes may be uneven and in any order, but must differ.
    """
    return [math.prod((u - b) / (a - b) for b in nodes if b != a) for a in nodes]


class _History:
    """The last ``order + 1`` values of some tensors, in float32: the weights of an extrapolation amplify rounding."""

    def __init__(self, order: int, values: Sequence[Tensor]) -> None:
        self._nodes: list[float] = []
        self._rings = [v.new_empty((order + 1, *v.shape), dtype=torch.float32) for v in values]
        self._next = 0

    def add(self, u: float, values: Sequence[Tensor]) -> None:
        """Takes the values at ``u``, in the place of the oldest."""
        self._nodes[self._next : self._next + 1] = [u]
        for ring, value in zip(self._rings, values):
            ring[self._next].copy_(value)
        self._next = (self._next + 1) % len(self._rings[0])

    def write(self, u: float, out: Sequence[Tensor]) -> None:
        """The values at ``u`` into contiguous ``out``, in one pass over the cache."""
        weights = lagrange_weights(self._nodes, u)
        factors = self._rings[0].new_tensor(weights)
        for ring, target in zip(self._rings, out):
            if len(weights) == 2:  # the same sum as below, 1.6 times as fast
                torch.lerp(ring[0], ring[1], weights[1], out=target)
            else:
                torch.mv(ring[: len(weights)].flatten(1).T, factors, out=target.view(-1))

    @property
    def nbytes(self) -> int:
        return sum(ring.nbytes for ring in self._rings)


class Forecast:
    """Extrapolates tensors of guidance branches that are stacked along the batch, each branch from its own history.

    The order grows with the refreshes of a branch, from 0 (its last value) to ``order``. A branch that a refresh leaves
    out is forgotten. Exact for what is a polynomial of that degree in the coordinate u.

    Args:
        order: degree of the polynomial, 0-3.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._histories: dict[str, _History] = {}
        self._out: list[Tensor] = []

    def add(self, names: tuple[str, ...], u: float, values: Sequence[Tensor]) -> None:
        """Takes a refresh at ``u``: ``values`` (R B, ...), the R branches ``names`` stacked."""
        each = list(zip(*(value.chunk(len(names)) for value in values)))
        self._histories = {
            name: self._histories.get(name) or _History(self._order, rows) for name, rows in zip(names, each)
        }
        for name, rows in zip(names, each):
            self._histories[name].add(u, rows)
        if [o.shape for o in self._out] != [v.shape for v in values]:
            self._out = [torch.empty_like(v, dtype=torch.float32) for v in values]

    def at(self, names: tuple[str, ...], u: float) -> tuple[Tensor, ...]:
        """The values of ``names`` (all of the last refresh, or some) at ``u``: float32, valid until the next call."""
        each = [out.tensor_split(len(self._histories))[: len(names)] for out in self._out]
        for name, rows in zip(names, zip(*each)):
            self._histories[name].write(u, rows)
        return tuple(out[: len(names) * len(rows[0])] for out, rows in zip(self._out, each))

    @property
    def nbytes(self) -> int:
        """Memory of histories and output together."""
        return sum(h.nbytes for h in self._histories.values()) + sum(o.nbytes for o in self._out)
