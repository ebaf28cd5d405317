"""Nearest neighbours in feature space, by pairwise distances in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024


def distances(queries: Tensor, keys: Tensor) -> Iterator[Tensor]:
    """(up to ROWS, len(keys)) Euclidean distances of the queries, batch by batch."""
    for rows in queries.split(ROWS):
        yield torch.cdist(rows, keys)


def radii(features: Tensor, k: int) -> Tensor:
    """(N,) distance of each feature to its ``k``-th nearest other one.

    Raises:
        ValueError: where there are not so many.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"k must be within [1, {len(features) - 1}] for {len(features)} pictures, got {k}")
    return torch.cat([rows.kthvalue(k + 1).values for rows in distances(features, features)])  # the first is itself


def nearest(queries: Tensor, keys: Tensor, *, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(distance, position in ``keys``) of the nearest key of each query; ``own`` (Q,) names one to leave out."""
    positions = []
    for start, rows in zip(range(0, len(queries), ROWS), distances(queries, keys)):
        if own is not None:
            rows.scatter_(1, own[start : start + ROWS, None], torch.inf)
        positions.append(rows.argmin(1))
    found = torch.cat(positions)
    # Distances by matrix products round a copy's to about 1e-3 of its norm; these are exact.
    return torch.linalg.vector_norm(queries - keys[found], dim=1), found
