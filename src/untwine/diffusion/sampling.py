"""The one sampling driver. It owns the loop, cancellation, the encoder refreshes and what each evaluation is told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from untwine.contracts import Condition, Prediction, StepInfo
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import (
    Branch,
    Guided,
    Interval,
    Weights,
    check_order,
    classifier_free,
    internal_guidance,
)
from untwine.diffusion.paths import LinearPath, Path
from untwine.diffusion.solvers import Euler, Solver
from untwine.diffusion.timesteps import TimeGrid, discrete_grid

Denoise = Callable[[Tensor, Tensor, StepInfo], Prediction]
"""(x, t, at) -> Prediction; t is a host float64 scalar"""


class Cancelled(Exception):
    """Sampling was stopped by ``on_step``; ``step`` is the last finished one."""

    def __init__(self, step: int) -> None:
        super().__init__(f"sampling was cancelled after step {step}")
        self.step = step


def integrate(
    solver: Solver,
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    noise: Callable[[StepInfo], Tensor] | None = None,
    refresh: Collection[int] | None = None,
    project: Callable[[Tensor, StepInfo], Tensor] | None = None,
    on_step: Callable[[StepInfo, Tensor], bool | None] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Carries x (B, C, *grid) from ``grid[start]`` to ``grid[stop]``.

    Args:
        denoise: a network with its guidance, e.g. :class:`~untwine.diffusion.guidance.Guided`.
        grid: (S + 1,) float64 host times; falling for generation, rising for inversion.
        noise: fresh noise for stochastic solvers, a function of (step, stage).
        refresh: steps at whose first evaluation a decoupled backbone recomputes its encoder state; None = at every
            evaluation. ``start`` must be among them.
        project: rewrites given parts of x after each step (known pixels, first frames).
        on_step: hears each finished step; returning False raises :class:`Cancelled`.
    """
    num_steps = len(grid) - 1
    stop = num_steps if stop is None else stop
    if not 0 <= start <= stop <= num_steps:
        raise ValueError(f"start and stop must satisfy 0 <= start <= stop <= {num_steps}, got {start}, {stop}")
    if noise is None and solver.stochastic:
        raise ValueError(f"{type(solver).__name__} is stochastic: pass noise, a function of StepInfo")
    _check_fixed_steps(solver, refresh=refresh)
    told = _itinerary(solver, grid, _check_refresh(refresh, start, num_steps), start, stop)
    memory = solver.init(x)
    for i in range(start, stop):

        def evaluate(x: Tensor, t: Tensor, stage: int, i: int = i) -> Prediction:
            return denoise(x, t, told[i, stage])

        def step_noise(stage: int, i: int = i) -> Tensor:
            assert noise is not None
            return noise(StepInfo(i, stage, num_steps))

        x, memory = solver.step(evaluate, x, memory, i, grid, path, step_noise)
        at = StepInfo(i, 0, num_steps, refresh is None or i in refresh)
        if project is not None:
            x = project(x, at)
        if on_step is not None and on_step(at, x) is False:
            raise Cancelled(i)
    return x


def _check_fixed_steps(solver: Solver, **given: Any) -> None:
    """Refuses what makes the velocity jump under a solver that chooses its steps by how smooth it is."""
    if solver.adaptive and (names := [name for name, value in given.items() if value is not None]):
        raise ValueError(
            f"{names[0]}: {type(solver).__name__} chooses its own times by the error of a smooth velocity, and cannot "
            "plan for one that changes on the way; leave it out, or take a solver of fixed steps such as heun"
        )


def _check_refresh(refresh: Collection[int] | None, start: int, num_steps: int) -> Collection[int] | None:
    if refresh is None:
        return None
    if wrong := [i for i in refresh if not 0 <= i < num_steps]:
        raise ValueError(f"refresh names steps {sorted(wrong)[:5]} outside [0, {num_steps - 1}]")
    if start not in refresh:
        raise ValueError(f"refresh must contain the first step, {start}: there is no state before it")
    return refresh


def _itinerary(
    solver: Solver, grid: Tensor, refresh: Collection[int] | None, start: int, stop: int
) -> dict[tuple[int, int], StepInfo]:
    """What each evaluation (step, stage) is told; a refresh also hears which evaluations its state will serve."""
    stops = [(i, stage, t) for i in range(start, stop) for stage, t in solver.evaluations(i, grid, i == start)]
    fresh = []
    for k, (i, _, _) in enumerate(stops):
        opens_step = k == 0 or stops[k - 1][0] != i
        fresh.append(refresh is None or (opens_step and i in refresh))
    bounds = [k for k, is_fresh in enumerate(fresh) if is_fresh] + [len(stops)]
    served = {a: tuple(stops[a:b]) for a, b in pairwise(bounds)}
    return {
        (i, stage): StepInfo(i, stage, len(grid) - 1, fresh[k], served.get(k, ()))
        for k, (i, stage, _) in enumerate(stops)
    }


@dataclass(frozen=True)
class Sampling:
    """How to sample: everything that, with a seed, determines an image."""

    solver: Solver = field(default_factory=Euler)
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    """(low, high) in untwine's time; None = everywhere. DDT's published (0.3, 1) is (0, 0.7)"""
    closed_interval: bool = False
    """whether guidance acts at the ends of the intervals as well (REPA, RAE, DiffusionBench), or between them only"""
    guidance_channels: int | None = None
    """guide the first so many channels only (the official DiT and SiT: 3 of 4); None = all"""
    internal_scale: float = 1.0
    """internal guidance, of models with a second prediction (``base_depth``): ``base + scale (full - base)``"""
    internal_null_scale: float | None = None
    """the same for the null branch; None = as internal_scale"""
    internal_interval: tuple[float, float] | None = None
    """where internal guidance acts; None = everywhere"""
    shift: float = 1.0
    """> 1 spends more steps near noise"""
    last_step: float | None = None
    """length of the last step before shifting; None = as the others"""
    grid_start: float = 1.0
    """the first time, before shifting: 1 is noise (SiT's noise predictors: 0.999)"""
    grid_end: float = 0.0
    """the last time, before shifting: 0 is data (RAE: 0.001)"""
    spacing: Literal["even", "stride"] = "even"
    """of the levels of a discrete chain: both ends kept, or every so many from the first (``ddimN``)"""
    refresh_every: int = 1
    """recompute the encoder state of a decoupled backbone every so many steps"""
    refresh: tuple[int, ...] | None = None
    """the steps at which to recompute it, the first among them; instead of refresh_every"""
    forecast_order: int = 0
    """between recomputations, extrapolate from the last ones by a polynomial of this degree, 0-3; 0 = reuse the last"""
    forecast_in: Literal["time", "step"] = "time"
    """variable of the polynomial; with uneven times (shift, last_step) the two differ"""
    retime: bool = False
    """between recomputations, mix the current time into the state anew"""
    modulation_budget_mib: int = 1024
    """memory that cached decoder modulations may take"""

    def __post_init__(self) -> None:
        if isinstance(self.num_inference_steps, bool) or not self.num_inference_steps >= 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {self.num_inference_steps}")
        self.weights(conditional=True)
        self._times()
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise ValueError(f"guidance_channels must be >= 1, or None for all, got {self.guidance_channels}")
        if not 1 <= self.refresh_every <= self.num_inference_steps:
            raise ValueError(
                f"refresh_every must be within [1, num_inference_steps = {self.num_inference_steps}], "
                f"got {self.refresh_every}"
            )
        _check_refresh(self.refresh, 0, self.num_inference_steps)
        intervals = {"guidance_interval": self.guidance_interval, "internal_interval": self.internal_interval}
        _check_fixed_steps(self.solver, **intervals, refresh=self.refresh_steps)
        check_order(self.forecast_order)

    @property
    def refresh_steps(self) -> tuple[int, ...] | None:
        """The steps at which the encoder state is recomputed; None = at every evaluation."""
        if self.refresh is None and self.refresh_every > 1:
            return tuple(range(0, self.num_inference_steps, self.refresh_every))
        return self.refresh

    def grid(self, path: Path) -> Tensor:
        """The times: a chain of discrete levels is respaced, anything else walks :class:`TimeGrid`."""
        num_timesteps = getattr(path, "num_timesteps", None)
        if num_timesteps is not None:
            return discrete_grid(num_timesteps, self.num_inference_steps, self.spacing)
        return self._times().times()

    def _times(self) -> TimeGrid:
        return TimeGrid(self.num_inference_steps, self.shift, self.last_step, self.grid_end, self.grid_start)

    def coordinate(self, grid: Tensor) -> Callable[[float], float]:
        """What forecasts are polynomials in: t itself, or the position of t on the falling ``grid``."""
        if self.forecast_in == "time":
            return float
        progress = (-grid).numpy()
        return lambda t: float(np.interp(-t, progress, np.arange(len(progress))))

    def weights(self, *, conditional: bool) -> Weights:
        """The weight table of the branches ``cond`` and, where the model is conditional, ``null``."""
        guided: Weights = classifier_free(self.guidance_scale, self._interval(self.guidance_interval))
        if not conditional:
            guided = lambda at, t: {"cond": 1.0}  # noqa: E731
        null_scale = self.internal_scale if self.internal_null_scale is None else self.internal_null_scale
        if self.internal_scale == null_scale == 1:
            return guided
        scales = {"cond": self.internal_scale, "null": null_scale}
        return internal_guidance(guided, scales, self._interval(self.internal_interval))

    def _interval(self, bounds: tuple[float, float] | None) -> Interval | None:
        return None if bounds is None else Interval(*bounds, closed=self.closed_interval)


@torch.no_grad()
def sample(
    model: Any,
    condition: Condition,
    shape: tuple[int, ...],
    index: Tensor,
    *,
    draws: Draws,
    null: Condition | None = None,
    sampling: Sampling | None = None,
    path: Path | None = None,
    refresh: Collection[int] | None = None,
    on_step: Callable[[StepInfo, Tensor], bool | None] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Guided]:
    """Latents (B, *shape) of the images ``index`` (B,), and the denoiser with its counts.

    Image k is a function of (seed, k, condition, settings) alone: neither batch size nor rank changes its noise.
    ``null`` is what guidance leads away from, where the model does not know it: the encoded empty or negative prompt.
    """
    sampling, path = sampling or Sampling(), path or LinearPath()
    grid = sampling.grid(path)
    refresh = sampling.refresh_steps if refresh is None else refresh
    if refresh is not None and not model.decoupled:
        raise ValueError(
            f"refresh: {type(model).__name__} has no encoder state to share between steps; leave refresh and "
            "refresh_every at their defaults, or use a decoupled backbone such as ddt"
        )
    if refresh is None and (sampling.forecast_order or sampling.retime):
        raise ValueError(
            "forecast_order and retime act between refreshes, and here every step is one; set refresh_every or refresh"
        )
    null = None if null is None else null.to(device)
    guided = guided_by(sampling, model, condition.to(device), grid, path, null)
    packed_shape = getattr(model, "packed_shape", None)  # of a model that draws more than the image
    shape = shape if packed_shape is None else packed_shape(shape)
    x, noise = noises(draws, shape, index, device=device)
    with _fresh_attachments(model):
        x = integrate(sampling.solver, guided, x, grid, path=path, noise=noise, refresh=refresh, on_step=on_step)
    return (x if packed_shape is None else model.unpack(x)["image"]), guided


def noises(
    draws: Draws, shape: tuple[int, ...], index: Tensor, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Callable[[StepInfo], Tensor]]:
    """The initial noise (B, *shape) of the images ``index``, and that of each step and stage."""

    def step_noise(at: StepInfo) -> Tensor:
        return draws.normal(f"sample/{at.step}/{at.stage}", shape, index, device=device)

    return draws.normal("sample", shape, index, device=device), step_noise


def guided_by(
    sampling: Sampling, model: Any, condition: Condition, grid: Tensor, path: Path, null: Condition | None = None
) -> Guided:
    """The denoiser that ``sampling`` asks for; ``null`` as in :func:`sample`."""
    branches = {"cond": Branch(model, condition)}
    is_conditional = bool(model.accepts - {"vectors.r"})
    if is_conditional:
        branches["null"] = Branch(model, model.null(condition) if null is None else null)
    return Guided(
        branches,
        sampling.weights(conditional=is_conditional),
        path=path,
        modulation_budget=sampling.modulation_budget_mib * 2**20,
        order=sampling.forecast_order,
        retime=sampling.retime,
        coordinate=sampling.coordinate(grid),
        end=(lambda at: float(grid[at.step + 1])) if sampling.solver.averages else None,
        channels=sampling.guidance_channels,
    )


@contextmanager
def _fresh_attachments(model: Any) -> Iterator[None]:
    """Whatever is attached to the model starts from nothing and leaves nothing, however sampling ends."""
    attached = tuple(getattr(model, "attached", ()))
    try:
        for attachment in attached:
            attachment.reset()
        yield
    finally:
        for attachment in attached:
            attachment.reset()
