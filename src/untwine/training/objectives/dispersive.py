"""Dispersive loss (Wang and He, arXiv 2506.09027): the samples of a batch are kept apart inside the network.

It is the repulsive half of a contrastive loss, over all pairs i < j of flattened features f of one block:

    l2          log mean exp(-|f_i - f_j|^2 / T)
    cosine      log mean exp(cos(f_i, f_j) / T)
    hinge       mean max(0, margin - |f_i - f_j|^2)^2
    covariance  sum over m != n of Cov_mn^2

Features have unit length first, as in DDT's code (github.com/MCG-NJU/DDT, ``training_disperse.py``: ``l2``); without
``normalise`` the squared distance is divided by the number of elements, as in the authors' (DispLoss).

Differs from the references: a sample is no pair with itself (DispLoss counts those). In training the pairs are those of
all processes, in evaluation of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from untwine.contracts import Output
from untwine.training.objectives.base import PathDraw, Term

Variant = Literal["l2", "cosine", "hinge", "covariance"]


class Dispersive(Term):
    """Repulsion between the samples of a micro-batch; there is no value per sample.

    Args:
        site: of the features, 0-based.
        variant: see the module.
        temperature: T of the logarithmic variants.
        margin: squared distance beyond which ``hinge`` rests.
        normalise: features to unit length first.
        scale: DDT's 0.5.

    Raises:
        ValueError: for a temperature or margin that is not positive; in training also for a batch of one sample.
    """

    def __init__(
        self,
        *,
        site: str = "blocks.7",
        variant: Variant = "l2",
        temperature: float = 1.0,
        margin: float = 1.0,
        normalise: bool = True,
        scale: float = 0.5,
    ) -> None:
        super().__init__()
        if temperature <= 0 or margin <= 0:
            raise ValueError(f"temperature and margin must be > 0, got {temperature} and {margin}")
        self.scale, self.sites, self.variant, self.normalise = scale, (site,), variant, normalise
        self.temperature, self.margin = temperature, margin

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        features = output.features[self.sites[0]].float().flatten(1)
        if self.training:
            features = _of_all_processes(features)
        if len(features) < 2:
            if self.training:
                raise ValueError("dispersive needs at least two samples in a batch; raise train.batch_size")
            return {}
        if self.normalise:
            features = F.normalize(features, dim=1)
        return {"dispersive": self.repulsion(features)}

    def repulsion(self, features: Tensor) -> Tensor:
        """The scalar loss of features (B, F)."""
        if self.variant == "covariance":
            return off_diagonal_covariance(features)
        if self.variant == "cosine":
            unit, (i, j) = F.normalize(features, dim=1), torch.triu_indices(len(features), len(features), 1)
            return _log_mean_exp((unit @ unit.T)[i, j] / self.temperature)
        distance = torch.pdist(features).square()
        if not self.normalise:
            distance = distance / features.shape[1]
        if self.variant == "hinge":
            return (self.margin - distance).clamp(min=0).square().mean()
        return _log_mean_exp(-distance / self.temperature)


def off_diagonal_covariance(features: Tensor) -> Tensor:
    """``sum over m != n of Cov_mn^2`` of features (B, F), by products of samples: F is far larger than B."""
    centred = features - features.mean(0)
    gram, squares = centred @ centred.T, centred.square().sum(0)
    return (gram.square().sum() - squares.square().sum()) / (len(features) - 1) ** 2


def _log_mean_exp(values: Tensor) -> Tensor:
    return (values.exp().mean() + 1e-5).log()


def _of_all_processes(features: Tensor) -> Tensor:
    """The rows of every process, in the order of ranks; gradients reach the process that each came from."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(features.contiguous()))
