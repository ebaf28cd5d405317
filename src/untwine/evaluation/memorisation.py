"""Are samples copies of the reference? Distances to the nearest reference picture, against those of real pictures.

A real picture's distance to the nearest *other* reference picture is what a held-out one's would be: it is the unit in
which the samples' distances are told. Copies lie near 0, new pictures about 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from untwine.evaluation.neighbours import nearest

COPY = 0.1
"""a sample nearer than this, in units of a held-out picture's distance, counts as a copy"""


@dataclass(frozen=True)
class Neighbours:
    """The nearest reference picture of each sample, in one space."""

    ratio: Tensor
    """(N,) distance over the median distance of a held-out picture"""
    position: Tensor
    """(N,) of the nearest reference picture"""

    def summary(self) -> dict[str, float | int]:
        """Median and smallest ratio, and how many samples count as copies."""
        return {
            "median_ratio": float(self.ratio.median()),
            "smallest_ratio": float(self.ratio.min()),
            "copies": int((self.ratio < COPY).sum()),
        }


def neighbours(samples: Tensor, reference: Tensor, *, probes: int = 2000) -> Neighbours:
    """Of each sample (N, D) among the reference (M, D); the unit is the median over ``probes`` reference pictures.

    Reference pictures with an identical twin say nothing about new ones, and are left out of the median.

    Raises:
        ValueError: for fewer than two different reference pictures.
    """
    own = torch.linspace(0, len(reference) - 1, min(probes, len(reference)), device=reference.device).round().long()
    apart = nearest(reference[own], reference, own=own)[0] if len(reference) > 1 else reference.new_zeros(0)
    if not (apart > 0).any():
        raise ValueError(f"reference must hold at least 2 different pictures, got {len(reference)}, all alike")
    unit = apart[apart > 0].median()
    distance, position = nearest(samples, reference)
    return Neighbours((distance / unit).cpu(), position.cpu())
