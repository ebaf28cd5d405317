"""The linear probe: how well a ridge classifier reads the class off frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ridge_accuracy(
    features: Tensor, labels: Tensor, held_features: Tensor, held_labels: Tensor, *, ridge: float = 1e-2
) -> float:
    """Fraction of held-out samples that a ridge regression onto one-hot labels classifies correctly.

    Features are standardised by the mean and deviation of the first set; the solution is exact, in float64.

    Args:
        features, held_features: (N, D) and (M, D).
        labels, held_labels: (N,) and (M,) int64 from 0.
        ridge: penalty on the squared weights, times N.

    Raises:
        ValueError: for sets that do not match, or a ridge that is not positive.
    """
    if features.shape[1:] != held_features.shape[1:] or features.ndim != 2 or not len(features):
        raise ValueError(f"features must be (N, D) and (M, D), got {features.shape} and {held_features.shape}")
    if len(features) != len(labels) or len(held_features) != len(held_labels) or not ridge > 0:
        raise ValueError(f"a label per row and ridge > 0 are needed, got {len(labels)}, {len(held_labels)} and {ridge}")
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    x, held = (F.pad((v - mean) / std, (0, 1), value=1.0).double() for v in (features, held_features))
    targets = F.one_hot(labels, int(max(labels.max(), held_labels.max())) + 1).double()
    penalty = ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ targets)
    return float(((held @ weights).argmax(1) == held_labels).double().mean())
