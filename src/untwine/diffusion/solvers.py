"""Solvers as step rules. The loop, the time grid, cancellation and encoder refreshes belong to the driver,
:func:`untwine.diffusion.sampling.integrate`.

A new solver is a frozen dataclass with a ``step`` method and a line in the registry; CONTRIBUTING shows one in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from untwine.contracts import Prediction
from untwine.diffusion.paths import Path

Evaluate = Callable[[Tensor, Tensor, int], Prediction]
"""(x, t, stage) -> Prediction"""
Noise = Callable[[int], Tensor]
"""stage -> standard normal noise shaped like x"""
Memory = Any
"""An explicit value (tensors in tuples) that a solver carries from step to step"""


class Solver:
    """A step rule; its fields are its options."""

    kinds: ClassVar[str] = "untwine.diffusion:SOLVERS"
    stochastic: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    """whether it asks for the mean velocity over a step, which a network of two times predicts"""
    adaptive: ClassVar[bool] = False
    """whether it chooses times of its own between two of the grid, which :meth:`evaluations` then cannot tell"""

    def init(self, x: Tensor) -> Memory:
        """What is remembered before the first step."""
        return None

    def evaluations(self, i: int, grid: Tensor, first: bool) -> tuple[tuple[int, float], ...]:
        """(stage, t) of every network evaluation in step i, in order; ``first``: nothing is remembered yet."""
        return ((0, float(grid[i])),)

    def step(
        self, denoise: Evaluate, x: Tensor, memory: Memory, i: int, grid: Tensor, path: Path, noise: Noise
    ) -> tuple[Tensor, Memory]:
        """x at ``grid[i + 1]`` from x at ``grid[i]``."""
        raise NotImplementedError


def _is_last(i: int, grid: Tensor) -> bool:
    return i == len(grid) - 2


Rule = Literal["ode", "sde", "mean", "preserve"]
DIFFUSIONS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "sigma": lambda path, t: path.at(t).sigma,
    "time": lambda path, t: t,
    "one": lambda path, t: torch.ones_like(t),
    "forward": lambda path, t: path.diffusion(t),
    "decreasing": lambda path, t: 0.25 * (1 - torch.cos(math.pi * t)) ** 2,
    "middle": lambda path, t: torch.sin(math.pi * t) ** 2,
}
"""w(t) of the reverse SDE. SiT calls them sigma, linear, constant, SBDM, decreasing and (in)creasing-decreasing; the
forward process' own is infinite at the noise end of a path that ends in pure noise"""


@dataclass(frozen=True)
class _OnSDE(Solver):
    """Solvers of the reverse SDE ``dx = v dt - w s dt + sqrt(2 w) dW`` (SiT, arXiv 2401.08740, eq. 5), score s.

    Rules: ``ode`` is w = 0; ``sde`` as written; ``mean`` without the noise; ``preserve`` with half the drift and half
    the variance (a variant of the official DDT code); ``tweedie`` jumps to the predicted x0.
    """

    rule: Rule = "ode"
    weight: Literal["sigma", "time", "one", "forward", "decreasing", "middle"] = "sigma"
    """the diffusion weight w(t) >= 0"""
    last_rule: Rule | Literal["tweedie"] = "ode"
    """of the last step; the ODE's leaves no fresh noise in the result"""
    weight_scale: float = 1.0
    """multiplies w"""

    def __post_init__(self) -> None:
        if not 0 <= self.weight_scale < math.inf:
            raise ValueError(f"weight_scale must be finite and >= 0, got {self.weight_scale}")

    @property
    def stochastic(self) -> bool:
        return any(rule in ("sde", "preserve") for rule in (self.rule, self.last_rule))

    def _weight(self, path: Path, t: Tensor) -> float:
        return self.weight_scale * float(DIFFUSIONS[self.weight](path, t))

    def _advance(
        self, x: Tensor, prediction: Prediction | _Mean, i: int, grid: Tensor, path: Path, noise: Callable[[], Tensor]
    ) -> Tensor:
        """One Euler step by the rule of step i."""
        rule = self.last_rule if _is_last(i, grid) else self.rule
        if rule == "tweedie":
            return prediction.x0
        dt = float(grid[i + 1] - grid[i])
        stepped = x + prediction.velocity * dt
        if rule == "ode":
            return stepped
        strength = (0.5 if rule == "preserve" else 1.0) * self._weight(path, grid[i]) * abs(dt)
        drifted = stepped + prediction.score * strength
        return drifted if rule == "mean" else drifted + noise() * (2 * strength) ** 0.5


@dataclass(frozen=True)
class Euler(_OnSDE):
    """Euler's method on the ODE, or Euler-Maruyama on the SDE: order 1, one evaluation a step."""

    def step(self, denoise, x, memory, i, grid, path, noise):
        return self._advance(x, denoise(x, grid[i], 0), i, grid, path, lambda: noise(0)), memory


@dataclass(frozen=True)
class MeanFlow(Solver):
    """Steps by the mean velocity over the step, which a network of two times predicts (arXiv 2505.13447, eq. 12).

    One to four steps are its purpose; with a network of one time it is Euler's method.
    """

    averages: ClassVar[bool] = True

    def step(self, denoise, x, memory, i, grid, path, noise):
        return x + denoise(x, grid[i], 0).velocity * float(grid[i + 1] - grid[i]), memory


@dataclass(frozen=True)
class Midpoint(Solver):
    """The explicit midpoint rule on the ODE: order 2, two evaluations a step."""

    def evaluations(self, i: int, grid: Tensor, first: bool) -> tuple[tuple[int, float], ...]:
        return ((0, float(grid[i])), (1, float((grid[i] + grid[i + 1]) / 2)))

    def step(self, denoise, x, memory, i, grid, path, noise):
        dt = float(grid[i + 1] - grid[i])
        middle = x + denoise(x, grid[i], 0).velocity * (dt / 2)
        return x + denoise(middle, (grid[i] + grid[i + 1]) / 2, 1).velocity * dt, memory


@dataclass(frozen=True)
class Heun(_OnSDE):
    """The trapezoid rule with an Euler predictor, on the ODE or the SDE; the last step is Euler's.

    ``reuse=False`` evaluates twice a step (order 2). ``reuse=True`` predicts with the previous step's corrector
    evaluation, one evaluation a step after the first, as the official DDT code does by default.
    """

    reuse: bool = False

    def evaluations(self, i: int, grid: Tensor, first: bool) -> tuple[tuple[int, float], ...]:
        predictor = ((0, float(grid[i])),) if first or not self.reuse else ()
        return predictor if _is_last(i, grid) else (*predictor, (1, float(grid[i + 1])))

    def step(self, denoise, x, memory, i, grid, path, noise):
        before = denoise(x, grid[i], 0) if memory is None or not self.reuse else memory
        guess = self._advance(x, before, i, grid, path, lambda: noise(0))
        if _is_last(i, grid):
            return guess, None
        after = denoise(guess, grid[i + 1], 1)
        return self._advance(x, _Mean(before, after), i, grid, path, lambda: noise(1)), after


@dataclass(frozen=True)
class StochasticHeun(_OnSDE):
    """Heun's method on the SDE as SiT has it: the noise of a step first, then the trapezoid rule on the drift.

    The last step is Euler's, by ``last_rule``.
    """

    rule: Literal["sde"] = "sde"

    def evaluations(self, i: int, grid: Tensor, first: bool) -> tuple[tuple[int, float], ...]:
        predictor = (0, float(grid[i]))
        return (predictor,) if _is_last(i, grid) else (predictor, (1, float(grid[i + 1])))

    def step(self, denoise, x, memory, i, grid, path, noise):
        if _is_last(i, grid):
            return self._advance(x, denoise(x, grid[i], 0), i, grid, path, lambda: noise(0)), memory

        def drift(x: Tensor, t: Tensor, stage: int) -> Tensor:
            prediction = denoise(x, t, stage)
            return prediction.velocity - self._weight(path, t) * prediction.score

        dt = float(grid[i + 1] - grid[i])
        x = x + noise(0) * (2 * self._weight(path, grid[i]) * abs(dt)) ** 0.5
        before = drift(x, grid[i], 0)
        return x + (before + drift(x + before * dt, grid[i + 1], 1)) * (dt / 2), memory


@dataclass(frozen=True)
class Dopri5(Solver):
    """Dormand and Prince's pair of order 5(4) on the ODE, in steps that its error estimate asks for; by torchdiffeq.

    The ODE sampler of SiT (arXiv 2401.08740). A grid of one step is one integration, whose evaluations the report
    counts; on a finer grid it starts anew at each time. Steps are chosen for the whole batch, so that an image is the
    same in another batch within the tolerances only. The last step ends at the end, where the reference steps over it
    and interpolates: no network is asked about times outside [0, 1].

    Raises:
        ImportError: without torchdiffeq.
    """

    adaptive: ClassVar[bool] = True
    rtol: float = 1e-3
    """accepted error of a step, relative to x"""
    atol: float = 1e-6
    """and what is accepted where x is zero; both bound the root mean square over the whole batch"""

    def __post_init__(self) -> None:
        if not (0 < self.rtol < math.inf and 0 < self.atol < math.inf):
            raise ValueError(f"rtol and atol must be finite and > 0, got {self.rtol} and {self.atol}")

    def step(self, denoise, x, memory, i, grid, path, noise):
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError("solver dopri5 needs torchdiffeq: pip install untwine[ode]") from error

        start, end = float(grid[i]), float(grid[i + 1])

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return denoise(x, t.double().cpu().clamp(min(start, end), max(start, end)), 0).velocity

        times = grid[i : i + 2].to(x.device)
        options = {"step_t": times[1:]}
        found = odeint(velocity, x, times, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)
        return found[-1], memory


@dataclass(frozen=True)
class _Mean:
    """The mean of two predictions."""

    first: Prediction
    second: Prediction

    @property
    def x0(self) -> Tensor:
        return (self.first.x0 + self.second.x0) / 2

    @property
    def velocity(self) -> Tensor:
        return (self.first.velocity + self.second.velocity) / 2

    @property
    def score(self) -> Tensor:
        return (self.first.score + self.second.score) / 2


_NODES: dict[str, Callable[[Tensor], Tensor]] = {
    "time": lambda u: u,
    "log_snr": lambda u: torch.log(u.clamp(min=1e-3) / (1 - u + 1e-3)),
    "snr": lambda u: u.clamp(min=1e-8) / (1 - u + 1e-8),
    "inverse_snr": lambda u: 1 / (u.clamp(min=1e-8) / (1 - u + 1e-8)),
}


def adams_weights(nodes: Tensor, start: Tensor, end: Tensor) -> list[float]:
    """Weights of ``values at nodes`` whose sum is the mean of their Lagrange interpolant over [start, end].

    They sum to 1 and are oldest first; with equal spacing they are the Adams-Bashforth coefficients. The weights are
    as precise as the dtype of ``nodes``: at order 4 and 30 steps, float32 is off by up to 0.04.
    """
    integrals = []
    for j in range(len(nodes)):
        others = [nodes[m] for m in range(len(nodes)) if m != j]
        scale = math.prod((nodes[j] - other for other in others), start=torch.ones_like(start))
        integrals.append((_antiderivative(others, end) - _antiderivative(others, start)) / scale)
    total = sum(integrals)
    return [float(value / total) for value in integrals]


def _antiderivative(roots: list[Tensor], x: Tensor) -> Tensor:
    """The integral from 0 to x of the monic polynomial with these roots."""
    degree = len(roots)
    value = 1 / (degree + 1) * x ** (degree + 1)
    for k in range(1, degree + 1):
        products = [math.prod(chosen) for chosen in combinations(roots, k)]
        if k > 1:  # the published order of summation, which matters in float32
            products = [products[-1], *products[:-1]]
        value = value + (-1) ** k / (degree + 1 - k) * sum(products) * x ** (degree + 1 - k)
    return value


@dataclass(frozen=True)
class AdamsBashforth(Solver):
    """Linear multistep of order 1-4 on an uneven grid: one evaluation a step (DDT's AdamLM, arXiv 2504.05741).

    ``nodes`` names the variable in which the velocities are interpolated; the step itself stays in t. The published
    sampler computes the weights in float32, where they are ill-conditioned; ``precision="float32"`` reproduces it.
    """

    order: int = 2
    nodes: Literal["time", "log_snr", "snr", "inverse_snr"] = "time"
    precision: Literal["float64", "float32"] = "float64"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"order must be 1, 2, 3 or 4, got {self.order!r}")

    def init(self, x: Tensor) -> Memory:
        return ()

    def step(self, denoise, x, memory, i, grid, path, noise):
        history = (*memory, denoise(x, grid[i], 0).velocity)[-self.order :]
        nodes = _NODES[self.nodes]((1 - grid[i + 1 - len(history) : i + 2]).to(getattr(torch, self.precision)))
        weights = adams_weights(nodes[:-1], nodes[-2], nodes[-1])
        mean = sum(w * v for w, v in zip(weights, history))
        return x + mean * float(grid[i + 1] - grid[i]), history


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (Song et al., arXiv 2010.02502, eq. 12) on any path; eta = 0 is deterministic, eta = 1 is DDPM-like."""

    eta: float = 0.0
    clip_x0: float | None = None
    """clamp the predicted x0 to [-clip_x0, clip_x0]"""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be within [0, 1], got {self.eta}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def step(self, denoise, x, memory, i, grid, path, noise):
        prediction = denoise(x, grid[i], 0)
        x0, eps = prediction.x0, prediction.noise
        if self.clip_x0 is not None:
            x0 = x0.clamp(-self.clip_x0, self.clip_x0)
            eps = path.x0_to_noise(x0, x, grid[i])
        after = path.at(grid[i + 1])
        _, variance = path.posterior(x0, x, grid[i], grid[i + 1])
        std = self.eta * float(variance) ** 0.5
        mean = after.alpha * x0 + (after.sigma**2 - std**2).clamp(min=0).sqrt() * eps
        return (mean + std * noise(0) if std > 0 else mean), memory


@dataclass(frozen=True)
class AncestralDDPM(Solver):
    """A draw from ``q(x_s | x_t, x0)`` (DDPM, arXiv 2006.11239, eq. 7), on any path and any two of its times.

    ``variance``: ``small`` the posterior's, ``large`` the transition's (beta), ``learned`` between the two in the log
    domain by the network's variance channels (Improved DDPM, arXiv 2102.09672, eq. 15).
    """

    variance: Literal["small", "large", "learned"] = "small"
    clip_x0: float | None = None
    stochastic: ClassVar[bool] = True

    def step(self, denoise, x, memory, i, grid, path, noise):
        prediction = denoise(x, grid[i], 0)
        x0 = prediction.x0 if self.clip_x0 is None else prediction.x0.clamp(-self.clip_x0, self.clip_x0)
        mean, variance = path.posterior(x0, x, grid[i], grid[i + 1])
        if _is_last(i, grid):
            return mean, memory
        _, transition = path.transition(grid[i], grid[i + 1])
        return mean + self._std(prediction, variance, transition) * noise(0), memory

    def _std(self, prediction: Prediction, posterior: Tensor, transition: Tensor) -> Tensor:
        if self.variance == "learned":
            if prediction.variance is None:
                raise ValueError("variance='learned' needs a model that predicts variance; use 'small' or 'large'")
            return torch.exp(0.5 * learned_log_variance(prediction.variance, posterior, transition))
        return (posterior if self.variance == "small" else transition).sqrt()


def learned_log_variance(share: Tensor, posterior: Tensor, transition: Tensor) -> Tensor:
    """Between two variances in the log domain, ``share`` in [-1, 1] (Improved DDPM, arXiv 2102.09672, eq. 15)."""
    share = (share + 1) / 2
    return share * transition.log() + (1 - share) * posterior.log()
