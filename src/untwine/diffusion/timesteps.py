"""Times: what training draws, and the grids that solvers walk.

A grid is a host tensor (S + 1,) of float64 times that falls from 1 (noise) to 0 (data). It is built in float32 counting
from the noise end, as the published samplers build theirs, and then turned around, which is exact in float64: an
interval bound that falls on a grid point is decided here exactly as in the published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from untwine.diffusion.draws import Draws


def shift_time(t: Tensor, shift: float) -> Tensor:
    """``shift t / (1 + (shift - 1) t)`` (SD3, arXiv 2403.03206, eq. 23): shift > 1 moves times towards noise."""
    return shift * t / (1 + (shift - 1) * t)


def dimension_shift(latent_shape: Sequence[int], *, base: int = 4096) -> float:
    """The shift for a latent of another size, ``sqrt(numel / base)`` (RAE, arXiv 2510.11690, section 4.3)."""
    size = math.prod(latent_shape)
    if size < 1 or base < 1:
        raise ValueError(f"dimension_shift needs positive sizes, got latent_shape {tuple(latent_shape)}, base {base}")
    return math.sqrt(size / base)


def _check_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a finite number > 0 (1 = uniform, > 1 = more time near noise), got {shift}")


class TimeDraw:
    """A distribution of training times on [0, 1]; :meth:`sample` gives each training sample its own draw."""

    kinds: ClassVar[str] = "untwine.diffusion:TIME_DRAWS"

    def sample(
        self, draws: Draws, index: Tensor, *, device: torch.device | str | None = None, name: str = "t"
    ) -> Tensor:
        """(B,) float32 times for the sample counters ``index``; ``name`` is that of the stream."""
        raise NotImplementedError


@dataclass(frozen=True)
class UniformTime(TimeDraw):
    """Uniform on [low, high)."""

    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        _check_shift(self.shift)

    def sample(
        self, draws: Draws, index: Tensor, *, device: torch.device | str | None = None, name: str = "t"
    ) -> Tensor:
        u = draws.uniform(name, (), index, device=device)
        return shift_time(self.low + (self.high - self.low) * u, self.shift)


@dataclass(frozen=True)
class LogitNormalTime(TimeDraw):
    """``sigmoid(mean + std n)`` (SD3, section 3.1; DDT's ``lognorm_t`` is mean 0, std 1): most in the middle."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    high: float = 1.0
    """before the shift, times above it do not occur (RAE: 0.999)"""

    def __post_init__(self) -> None:
        _check_std(self.std)
        _check_shift(self.shift)
        _check_range(0.0, self.high)

    def sample(
        self, draws: Draws, index: Tensor, *, device: torch.device | str | None = None, name: str = "t"
    ) -> Tensor:
        if self.high == 1:
            return self.transform(draws.normal(name, (), index, device=device))
        u = draws.uniform(name, (), index).double()
        highest = torch.special.ndtr((torch.logit(torch.tensor(self.high).double()) - self.mean) / self.std)
        return self.transform(torch.special.ndtri(u * highest)).float().to(device or "cpu")

    def transform(self, normal: Tensor) -> Tensor:
        """Times from standard normal draws."""
        return shift_time(torch.sigmoid(self.mean + self.std * normal), self.shift)


@dataclass(frozen=True)
class ArctanNormalTime(TimeDraw):
    """``2/pi atan(exp(mean + std n))``: sigma / alpha of the cosine path is log-normal, as it is for a logit-normal
    time on the linear path (REPA, arXiv 2410.06940, "lognormal")."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std(self.std)

    def sample(
        self, draws: Draws, index: Tensor, *, device: torch.device | str | None = None, name: str = "t"
    ) -> Tensor:
        normal = draws.normal(name, (), index, device=device)
        return 2 / math.pi * torch.atan(torch.exp(self.mean + self.std * normal))


@dataclass(frozen=True)
class TruncatedNormalTime(TimeDraw):
    """A normal distribution restricted to [low, high], by its inverse distribution function."""

    mean: float = 0.5
    std: float = 0.25
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        _check_std(self.std)

    def sample(
        self, draws: Draws, index: Tensor, *, device: torch.device | str | None = None, name: str = "t"
    ) -> Tensor:
        u = draws.uniform(name, (), index).double()
        ends = torch.tensor([self.low, self.high], dtype=torch.float64)
        below, above = torch.special.ndtr((ends - self.mean) / self.std)
        t = self.mean + self.std * torch.special.ndtri(below + (above - below) * u)
        return t.clamp(self.low, self.high).float().to(device or "cpu")


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std must be > 0, got {std}")


def _check_range(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"low and high must satisfy 0 <= low < high <= 1, got {low}, {high}")


@dataclass(frozen=True)
class TimeGrid:
    """The times of a sampling run."""

    num_steps: int = 50
    """network steps, >= 1"""
    shift: float = 1.0
    """> 1 spends more steps near noise"""
    last_step: float | None = None
    """length of the last step before shifting; None = as the others, a uniform grid (DDT: 250 steps, 0.04)"""
    end: float = 0.0
    """the last time, before shifting (RAE: 0.001)"""
    start: float = 1.0
    """the first time, before shifting: below 1 where a network cannot tell x0 from pure noise (SiT: 0.999)"""

    def __post_init__(self) -> None:
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"num_steps must be an integer >= 1, got {self.num_steps!r}")
        _check_shift(self.shift)
        if not 0 <= self.end < self.start <= 1:
            raise ValueError(f"start and end must satisfy 0 <= end < start <= 1, got {self.start}, {self.end}")
        if self.last_step is not None and not 0 < self.last_step <= self.start - self.end:
            raise ValueError(f"last_step must be within (0, {self.start - self.end}], got {self.last_step}")

    def times(self) -> Tensor:
        """(num_steps + 1,) float64 on the host, from ``start`` down to ``end``, shifted."""
        first, end = 1.0 - self.start, 1.0 - self.end
        last = (end - first) / self.num_steps if self.last_step is None else self.last_step
        progress = torch.cat([torch.linspace(first, end - last, self.num_steps), torch.tensor([end])])
        progress = progress / (progress + (1 - progress) * self.shift)
        return 1 - progress.double()


def discrete_grid(num_timesteps: int, num_steps: int, spacing: Literal["even", "stride"] = "even") -> Tensor:
    """The grid of a chain of ``num_timesteps`` levels respaced to ``num_steps``: (num_steps + 1,) float64 times
    ``(k + 1) / T`` from the top down, then 0 (Improved DDPM, arXiv 2102.09672).

    Args:
        spacing: ``even`` keeps the first and the last level; ``stride`` takes every so many levels from the first (the
            ``ddimN`` of the official DiT).

    Raises:
        ValueError: where there are fewer levels than steps, or no whole stride gives as many steps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must be within [1, {num_timesteps}] for this chain, got {num_steps}")
    if spacing == "stride":
        levels = next((r for s in range(1, num_timesteps) if len(r := range(0, num_timesteps, s)) == num_steps), None)
        if levels is None:
            raise ValueError(f"num_steps: no whole stride over {num_timesteps} levels makes {num_steps} steps")
    else:
        stride = (num_timesteps - 1) / (num_steps - 1) if num_steps > 1 else 1.0
        levels = [round(i * stride) for i in range(num_steps)]
    return torch.tensor([(k + 1) / num_timesteps for k in reversed(levels)] + [0.0], dtype=torch.float64)
