"""The variational bound that trains the variance of a discrete chain (Improved DDPM, arXiv 2102.09672, section 3.1).

``L_vlb = KL(q(x_s | x_t, x0) || p(x_s | x_t))`` one level down, s = t - 1/T, and ``-log p(x0 | x_1)`` of data in 255
bins on [-1, 1] at the last level; in bits per element. The mean of p is detached: only the variance learns from it.
With ``path: discrete`` this is DiT's hybrid loss (arXiv 2212.09748), which adds the bound unscaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from untwine.contracts import Output
from untwine.diffusion.paths import DiscretePath, expand_time
from untwine.diffusion.solvers import learned_log_variance
from untwine.training.objectives.base import PathDraw, Term


class VariationalBound(Term):
    """The bound of one level, for a network with variance channels on the discrete path."""

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        if not isinstance(draw.path, DiscretePath):
            raise ValueError(f"variational_bound needs path: discrete, got {type(draw.path).__name__}")
        if "variance" not in output.extra:
            raise ValueError("variational_bound needs a model that predicts variance: a dit with learn_sigma")
        x0 = draw.prediction(output.sample.detach().float()).x0
        return {"bound": bound(draw.path, draw.x0, x0, draw.x_t, draw.t, output.extra["variance"])}


def bound(path: DiscretePath, x0: Tensor, guess: Tensor, x: Tensor, t: Tensor, variance: Tensor) -> Tensor:
    """(B,) float32, bits per element.

    Args:
        x0, guess: clean data and the network's estimate of it, (B, C, *grid).
        x: the noisy sample at t (B,), levels of ``path``.
        variance: raw variance channels, (B, C, *grid).
    """
    x0, guess, x, variance = (v.double() for v in (x0, guess, x, variance))  # variances cancel in float32
    t = t.double()
    s = t - 1 / path.num_timesteps
    mean, _ = path.posterior(x0, x, t, s)
    center, _ = path.posterior(guess, x, t, s)
    # At the last level the posterior has no variance; that of the level above stands in for it.
    least = t.clamp(min=2 / path.num_timesteps)
    _, posterior = path.posterior(x0, x, least, least - 1 / path.num_timesteps)
    _, transition = path.transition(expand_time(t, x), expand_time(s, x))
    log_variance = learned_log_variance(variance, posterior, transition)
    kl = gaussian_kl(mean, posterior.log(), center, log_variance)
    nll = -discretized_log_likelihood(x0, center, 0.5 * log_variance)
    is_last = expand_time(path.levels(t) == 0, x)
    return (torch.where(is_last, nll, kl).flatten(1).mean(1) / math.log(2)).float()


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """``KL(N(mean, variance) || N(other ...))`` in nats, elementwise."""
    difference = log_variance - other_log_variance
    return 0.5 * (difference.exp() - difference - 1 + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around x, the outermost bins open, in nats, elementwise.

    The normal distribution function is the tanh approximation of the published code.
    """

    def cdf(edge: Tensor) -> Tensor:
        z = (edge - mean) * torch.exp(-log_std)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    above, below = cdf(x + 1 / 255), cdf(x - 1 / 255)
    inside = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inside).clamp(min=1e-12).log()
