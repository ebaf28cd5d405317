"""Metrics as pure functions of features; the Frechet distance is in :mod:`untwine.evaluation.statistics`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from untwine.evaluation.neighbours import distances, radii


@dataclass(frozen=True)
class Spread:
    """A mean with the standard deviation of what was averaged."""

    mean: float
    std: float


def inception_score(logits: Tensor, splits: int = 10) -> Spread:
    """``exp E KL(p(y|x) || p(y))`` of class scores (N, K), over equal runs of pictures in their order.

    Salimans et al., arXiv 1606.03498. ADM takes runs of 5000: 10 splits of 50 000 pictures; 1 = all at once.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must be within [1, {len(logits)}] for {len(logits)} pictures, got {splits}")
    log_p = logits.double().log_softmax(1)
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        part = log_p[start:stop]
        scores.append((part.exp() * (part - part.exp().mean(0).log())).sum(1).mean().exp())
    values = torch.stack(scores)
    return Spread(float(values.mean()), float(values.std(correction=0)))


def kernel_distance(
    samples: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Spread:
    """KID: unbiased squared MMD with the kernel ``(x.y / D + 1)^3``, mean over random subsets.

    Binkowski et al., arXiv 1801.01401. Subsets are torch-fidelity's for the same seed.

    Raises:
        ValueError: where a set is smaller than a subset.
    """
    smallest = min(len(samples), len(reference))
    if not 2 <= subset_size <= smallest or subsets < 1:
        raise ValueError(
            f"subset_size must be within [2, {smallest}], the smaller set, and subsets >= 1; got {subset_size} and "
            f"{subsets}"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(rng.choice(len(features), subset_size, replace=False))].double()
            for features in (samples, reference)
        )
        values.append(_mmd(x, y))
    return Spread(float(np.mean(values)), float(np.std(values)))


def _mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of one size, (M, D) each."""
    m, d = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
    return float(within / (m * (m - 1)) - 2 * kernel(x, y).mean())


def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Share of samples within the manifold of the reference, and of the reference within that of the samples.

    A manifold is the union of the balls around its features that reach to the ``k``-th nearest other one:
    Kynkaanniemi et al., arXiv 1904.06991, with ADM's k = 3.
    """

    def covered(queries: Tensor, manifold: Tensor) -> float:
        reach = radii(manifold, k)
        inside = [(rows <= reach).any(1) for rows in distances(queries, manifold)]
        return float(torch.cat(inside).double().mean())

    return covered(samples, reference), covered(reference, samples)


def density_coverage(samples: Tensor, reference: Tensor, *, k: int = 5) -> tuple[float, float]:
    """Reference balls that a sample lies in, over k, and the share of reference balls that hold a sample.

    Naeem et al., arXiv 2002.09797, eq. 3 and 4: less swayed by outliers than precision and recall.
    """
    reach = radii(reference, k)
    within, held = 0.0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows in distances(samples, reference):
        inside = rows < reach
        within += float(inside.sum())
        held |= inside.any(0)
    return within / (k * len(samples)), float(held.double().mean())


def clip_score(images: Tensor, texts: Tensor) -> Spread:
    """``100 max(cos, 0)`` of picture and caption embeddings (N, D), mean over the pairs (arXiv 2104.08718, w = 100)."""
    if images.shape != texts.shape:
        raise ValueError(f"images and texts must pair up, got {tuple(images.shape)} and {tuple(texts.shape)}")
    scores = 100 * F.cosine_similarity(images.double(), texts.double()).clamp(min=0)
    return Spread(float(scores.mean()), float(scores.std(correction=0)))
