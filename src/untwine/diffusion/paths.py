"""Paths between data and noise, and the conversions between what a network may predict along them.

**The time convention of untwine, stated here once.** t = 0 is data, t = 1 is noise:

    x_t = alpha(t) x0 + sigma(t) noise,      velocity = d x_t / d t = alpha'(t) x0 + sigma'(t) noise

so on the linear path ``velocity = noise - x0``. Models published in the opposite direction (DDT, SiT, LightningDiT)
are converted once, in their weights (:mod:`untwine.integrations.official`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

_EPS = 1e-6  # the smallest divisor at the ends of a path, where a conversion has no finite value


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma and their time derivatives, broadcastable to the sample."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def determinant(self) -> Tensor:
        """``alpha sigma' - sigma alpha'``, positive inside every path; 1 on the linear one."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """t of shape (), (B,) or (B, T) made broadcastable to x of shape (B, C, *grid); a (B, T) time runs over frames."""
    if t.ndim == 0:
        return t
    if t.ndim == 1:
        return t.view(-1, *([1] * (x.ndim - 1)))
    return t.view(t.shape[0], 1, t.shape[1], *([1] * (x.ndim - 3)))


def _guard(divisor: Tensor) -> Tensor:
    return divisor.clamp(min=_EPS)


@dataclass(frozen=True, kw_only=True)
class Path:
    """A pair of schedules alpha(t), sigma(t). Subclasses give :meth:`at`; everything else follows."""

    kinds: ClassVar[str] = "untwine.diffusion:PATHS"

    sigma_floor: float = 0.0
    """the least sigma by which a velocity is divided: networks that predict x0 are trained and sampled with 0.05 (JiT,
    arXiv 2511.13720); the velocity's target then shrinks by ``sigma / sigma_floor`` near the data"""

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_floor < 1:
            raise ValueError(f"sigma_floor must be within [0, 1), got {self.sigma_floor}")

    def at(self, t: Tensor) -> Coefficients:
        """The four coefficients at t, elementwise."""
        raise NotImplementedError

    def coefficients(self, t: Tensor, x: Tensor) -> Coefficients:
        """The four coefficients at t (), (B,) or (B, T), broadcastable to x."""
        return self.at(expand_time(t, x))

    def snap(self, t: Tensor) -> Tensor:
        """The times nearest to ``t`` at which samples exist: a chain has levels only."""
        return t

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = alpha x0 + sigma noise``."""
        c = self.coefficients(t, x0)
        return c.alpha * x0 + c.sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``alpha' x0 + sigma' noise``."""
        c = self.coefficients(t, x0)
        return c.d_alpha * x0 + c.d_sigma * noise

    def velocity_to_x0(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        c = self.coefficients(t, x)
        return (c.d_sigma * x - c.sigma * velocity) / c.determinant

    def velocity_to_noise(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        c = self.coefficients(t, x)
        return (c.alpha * velocity - c.d_alpha * x) / c.determinant

    def noise_to_x0(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Guarded where alpha = 0 (pure noise does not determine x0)."""
        c = self.coefficients(t, x)
        return (x - c.sigma * noise) / _guard(c.alpha)

    def x0_to_noise(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Guarded where sigma = 0 (clean data does not determine the noise)."""
        c = self.coefficients(t, x)
        return (x - c.alpha * x0) / _guard(c.sigma)

    def noise_to_velocity(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(self.noise_to_x0(noise, x, t), noise, t)

    def x0_to_velocity(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """``(sigma' x - det x0) / sigma``, sigma at least ``sigma_floor``: ``(x - x0) / t`` on the linear path."""
        c = self.coefficients(t, x)
        return (c.d_sigma * x - c.determinant * x0) / c.sigma.clamp(min=max(self.sigma_floor, _EPS))

    def score_to_noise(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return -self.coefficients(t, x).sigma * score

    def score_to_x0(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.noise_to_x0(self.score_to_noise(score, x, t), x, t)

    def score_to_velocity(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.noise_to_velocity(self.score_to_noise(score, x, t), x, t)

    def noise_to_score(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """``-noise / sigma``, guarded where sigma = 0."""
        return -noise / _guard(self.coefficients(t, x).sigma)

    def velocity_to_score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.noise_to_score(self.velocity_to_noise(velocity, x, t), x, t)

    def x0_to_score(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.noise_to_score(self.x0_to_noise(x0, x, t), x, t)

    def convert(self, value: Tensor, x: Tensor, t: Tensor, *, source: str, target: str) -> Tensor:
        """``value`` read as ``source``, expressed as ``target``; both velocity, noise, x0 or score."""
        return value if source == target else getattr(self, f"{source}_to_{target}")(value, x, t)

    def target(self, kind: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network that predicts ``kind`` should return."""
        if kind == "velocity":
            velocity, c = self.velocity(x0, noise, t), self.coefficients(t, x0)
            return velocity * (c.sigma / self.sigma_floor).clamp(max=1) if self.sigma_floor else velocity
        return {"x0": lambda: x0, "noise": lambda: noise, "score": lambda: self.noise_to_score(noise, x0, t)}[kind]()

    def drift(self, t: Tensor) -> Tensor:
        """``f = alpha' / alpha`` of the forward process ``dx = f x dt + g dw``, guarded where alpha = 0."""
        c = self.at(t)
        return c.d_alpha / _guard(c.alpha)

    def diffusion(self, t: Tensor) -> Tensor:
        """``g^2 / 2 = sigma sigma' - f sigma^2`` of the forward process."""
        c = self.at(t)
        return c.sigma * c.d_sigma - self.drift(t) * c.sigma**2

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean factor and variance of ``q(x_t | x_s)``, s < t."""
        now, before = self.at(t), self.at(s)
        ratio = now.alpha / before.alpha
        return ratio, now.sigma**2 - (ratio * before.sigma) ** 2

    def posterior(self, x0: Tensor, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``q(x_s | x_t = x, x0)``, s < t (DDPM, arXiv 2006.11239, eq. 7)."""
        t, s = expand_time(t, x), expand_time(s, x)
        now, after = self.at(t), self.at(s)
        ratio, transition = self.transition(t, s)
        share = (after.sigma / now.sigma) ** 2
        return ratio * share * x + after.alpha * (transition / now.sigma**2) * x0, transition * share


@dataclass(frozen=True)
class LinearPath(Path):
    """Rectified flow (Liu et al., arXiv 2209.03003): ``x_t = (1 - t) x0 + t noise``."""

    def at(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)


@dataclass(frozen=True)
class CosinePath(Path):
    """The trigonometric path, "GVP" in SiT (arXiv 2401.08740): ``alpha = cos(pi t / 2), sigma = sin(pi t / 2)``."""

    def at(self, t: Tensor) -> Coefficients:
        half_pi = math.pi / 2
        alpha, sigma = torch.cos(half_pi * t), torch.sin(half_pi * t)
        return Coefficients(alpha, sigma, -half_pi * sigma, half_pi * alpha)


def _variance_preserving(log_alpha: Tensor, d_log_alpha: Tensor) -> Coefficients:
    alpha = torch.exp(log_alpha)
    sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
    d_alpha = d_log_alpha * alpha
    return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / _guard(sigma))


@dataclass(frozen=True)
class VPPath(Path):
    """The variance-preserving diffusion of Song et al. (arXiv 2011.13456, eq. 32) with linear beta(t)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"beta_min and beta_max must satisfy 0 < min <= max, got {self.beta_min}, {self.beta_max}")

    def at(self, t: Tensor) -> Coefficients:
        slope = self.beta_max - self.beta_min
        log_alpha = -0.25 * slope * t**2 - 0.5 * self.beta_min * t
        return _variance_preserving(log_alpha, -0.5 * (self.beta_min + slope * t))


@dataclass(frozen=True)
class DiscretePath(Path):
    """DDPM's chain of T noise levels (Ho et al., arXiv 2006.11239): level k sits at ``t = (k + 1) / T``, data at 0.

    Between levels ``log alpha`` is interpolated linearly, so that continuous solvers may use the path as well.
    """

    num_timesteps: int = 1000
    schedule: Literal["linear", "scaled_linear"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_timesteps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"DiscretePath needs num_timesteps >= 1 and 0 < beta_start <= beta_end < 1, got {self}")

    def levels(self, t: Tensor) -> Tensor:
        """The integer level ``k = round(t T) - 1``; -1 is data."""
        return torch.round(t * self.num_timesteps).long() - 1

    def snap(self, t: Tensor) -> Tensor:
        """Up to the next level; uniform times make uniform levels."""
        return torch.ceil(t * self.num_timesteps - 1e-3).clamp(min=1) / self.num_timesteps

    def at(self, t: Tensor) -> Coefficients:
        table = _log_alphas(self).to(t.device)
        place = (t.double() * self.num_timesteps).clamp(0, self.num_timesteps)
        nearest = torch.round(place)
        place = torch.where((place - nearest).abs() < 1e-3, nearest, place)  # float32 times hit their level exactly
        below = place.floor().clamp(max=self.num_timesteps - 1).long()
        slope = table[below + 1] - table[below]
        log_alpha = table[below] + slope * (place - below)
        c = _variance_preserving(log_alpha, slope * self.num_timesteps)
        return Coefficients(*(v.to(t.dtype) for v in (c.alpha, c.sigma, c.d_alpha, c.d_sigma)))


@lru_cache(maxsize=16)
def _log_alphas(path: DiscretePath) -> Tensor:
    """(T + 1,) float64 log alpha, data first."""
    start, end, steps = path.beta_start, path.beta_end, path.num_timesteps
    if path.schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.log1p(-betas).cumsum(0)])
