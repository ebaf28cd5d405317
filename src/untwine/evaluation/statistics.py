"""Mean and covariance of features, accumulated in float64, and the Frechet distance between two of them.

The distance between Gaussians (Dowson & Landau 1982; FID: Heusel et al., arXiv 1706.08500) is

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)).

The last trace is the sum of the square roots of the eigenvalues of ``C1 C2``, which are those of the symmetric
``R^T C2 R`` with ``C1 = R R^T``: real, and not negative beyond rounding. No matrix square root is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean and unbiased covariance of a set of features."""

    mean: Tensor
    """(D,) float64"""
    covariance: Tensor
    """(D, D) float64"""
    count: int | None = None
    """pictures it was estimated from; None where a file does not say"""

    def project(self, axes: Tensor) -> Gaussian:
        """Of the features' coordinates on orthonormal ``axes`` (D, K)."""
        return Gaussian(self.mean @ axes, axes.T @ self.covariance @ axes, self.count)

    def principal_axes(self, number: int) -> Tensor:
        """(D, number) eigenvectors of the covariance with the largest eigenvalues.

        Raises:
            ValueError: where the pictures do not span so many.
        """
        limit = min(len(self.mean), len(self.mean) if self.count is None else self.count - 1)
        if not 1 <= number <= limit:
            raise ValueError(
                f"principal_axes: {self.count} pictures with {len(self.mean)} features span at most {limit} axes, "
                f"got {number}; use more reference pictures or fewer axes"
            )
        return torch.linalg.eigh(self.covariance).eigenvectors[:, -number:].flip(1)


class Moments:
    """A running mean and scatter matrix; the order and the size of the batches do not matter beyond rounding."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros(0, dtype=torch.float64)

    @classmethod
    def of(cls, batches: Tensor | Iterable[Tensor]) -> Moments:
        """Of features (N, D), whole or in batches."""
        moments = cls()
        for batch in batches.split(4096) if isinstance(batches, Tensor) else batches:
            moments.update(batch)
        return moments

    def update(self, features: Tensor) -> None:
        """Adds features (B, D).

        Raises:
            ValueError: for another shape or values that are not finite.
        """
        if features.ndim != 2 or (self.count and features.shape[1] != len(self.mean)):
            raise ValueError(f"features must be (B, {len(self.mean) or 'D'}), got {tuple(features.shape)}")
        if not len(features):
            return
        if not features.isfinite().all():
            raise ValueError("features hold values that are not finite; check the encoder and its input")
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        self._add(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: Moments) -> None:
        """Adds what ``other`` has seen."""
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def reduce(self) -> Moments:
        """Of the features of all processes, on each of them; collective. This one is left alone."""
        total = Moments()
        for moments in gather(self):
            total.merge(moments)
        return total

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance.

        Raises:
            ValueError: with fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Pairwise update of Chan, Golub & LeVeque (1983): no large sums are subtracted from each other."""
        if not self.count:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total, step = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet (2-Wasserstein) distance between two Gaussians.

    Raises:
        ValueError: where a covariance comes from too few pictures to have full rank, which would bias the distance
            by an unknown amount: project both on a few axes, or use more pictures.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features differ in number: {len(a.mean)} and {len(b.mean)}; use one encoder for both")
    for gaussian in (a, b):
        if gaussian.count is not None and gaussian.count <= len(gaussian.mean):
            raise ValueError(
                f"a covariance of {len(gaussian.mean)} features from {gaussian.count} pictures is singular; use more "
                f"than {len(gaussian.mean)} pictures, or project on principal_axes"
            )
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    product = torch.linalg.eigvalsh(root.T @ b.covariance @ root)
    step = a.mean - b.mean
    trace = a.covariance.trace() + b.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return float(step @ step + trace)


def process() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """``value`` of every process by rank, on each of them; collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
