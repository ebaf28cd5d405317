"""Contracts of paths, time draws and solvers, checked against Gaussian data, where everything has a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from untwine.contracts import Prediction, StepInfo
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import LinearPath, Path
from untwine.diffusion.sampling import integrate
from untwine.diffusion.solvers import Solver
from untwine.diffusion.timesteps import TimeDraw, TimeGrid


@dataclass(frozen=True)
class GaussianData:
    """Data ``N(mean, std^2)``: the exact velocity at every (x, t), and the exact solution of its ODE."""

    path: Path
    mean: float = 0.7
    std: float = 0.4

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        c = self.path.at(t)
        return c.alpha * self.mean, c.alpha**2 * self.std**2 + c.sigma**2

    def denoise(self, x: Tensor, t: Tensor, at: StepInfo) -> Prediction:
        """The perfect network."""
        c, (centre, variance) = self.path.at(t), self._moments(t)
        x0 = self.mean + c.alpha * self.std**2 / variance * (x - centre)
        noise = c.sigma / variance * (x - centre)
        return Prediction(c.d_alpha * x0 + c.d_sigma * noise, "velocity", x, t, self.path)

    def solution(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Where the ODE carries x from one time to another."""
        (centre, variance), (target, final) = self._moments(start), self._moments(end)
        return target + (final / variance).sqrt() * (x - centre)


def check_path(path: Path) -> None:
    """Ends, derivatives, and that every conversion inverts every other."""
    ends = path.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert abs(ends.alpha[0] - 1) < 1e-6 and abs(ends.sigma[0]) < 1e-3, "at t = 0 a path is at the data"
    assert ends.alpha[1] < 0.1 and abs(ends.sigma[1] - 1) < 1e-2, "at t = 1 a path is at the noise"
    t = (torch.arange(50, 951, 25) + 0.5).double() / 1000  # between the levels of a discrete chain
    c, h = path.at(t), 1e-4
    for name in ("alpha", "sigma"):
        slope = (getattr(path.at(t + h), name) - getattr(path.at(t - h), name)) / (2 * h)
        error = (slope - getattr(c, f"d_{name}")).abs().max()
        assert error < 0.02, f"d_{name} is not the derivative of {name}: off by {error:.2g}"
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(len(t), 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = path.interpolate(x0, noise, t)
    known = {kind: path.target(kind, x0, noise, t) for kind in ("velocity", "noise", "x0")}  # type: ignore[arg-type]
    for source, value in known.items():
        for target, expected in known.items():
            found = path.convert(value, x, t, source=source, target=target)  # type: ignore[arg-type]
            error = (found - expected).abs().max()
            assert error < 1e-6, f"{source}_to_{target} is off by {error:.2g}"
        for end in (0.0, 1.0):
            at_end = torch.full_like(t, end)
            for target in ("velocity", "noise", "x0", "score"):
                found = path.convert(value, x, at_end, source=source, target=target)  # type: ignore[arg-type]
                assert found.isfinite().all(), f"{source}_to_{target} is not finite at t = {end}"


def check_time_draw(draw: TimeDraw) -> None:
    """Range, dtype, and that a sample's time depends on its counter alone."""
    draws, index = Draws(1), torch.arange(512)
    t = draw.sample(draws, index)
    assert t.shape == (512,) and t.dtype == torch.float32, "times are (B,) float32"
    assert ((t >= 0) & (t <= 1)).all(), f"times leave [0, 1]: {t.min()} .. {t.max()}"
    assert t.unique().numel() > 400, "times repeat"
    assert torch.equal(draw.sample(draws, index[100:103]), t[100:103]), "a time depends on its batch"


def check_solver(solver: Solver, *, order: float | None = 1, path: Path | None = None) -> None:
    """Evaluations as declared, explicit memory, and convergence of the stated order (None = do not measure it)."""
    path = path or LinearPath()
    data = GaussianData(path)
    x = Draws(2).normal("x", (64,), [0])
    _check_evaluations(solver, data, x)
    if solver.stochastic:
        _check_distribution(solver, data)
        return
    errors = []
    for num_steps in (32, 64):
        grid = TimeGrid(num_steps, last_step=1 / num_steps).times()
        start, end = grid[0].clone(), grid[-1].clone()
        found = integrate(solver, data.denoise, x.double(), grid, path=path)
        errors.append(float((found - data.solution(x.double(), start, end)).abs().max()))
    assert errors[1] < 0.05, f"does not converge: error {errors[1]:.3g} after 64 steps"
    if order is not None and not solver.adaptive:
        slope = math.log2(errors[0] / errors[1])
        assert slope > order - 0.3, f"order {slope:.2f} measured, {order} stated (errors {errors})"


def _check_evaluations(solver: Solver, data: GaussianData, x: Tensor) -> None:
    grid, seen = TimeGrid(6).times(), []

    def denoise(x: Tensor, t: Tensor, at: StepInfo) -> Prediction:
        seen.append((at.step, at.stage, float(t)))
        return data.denoise(x, t, at)

    def noise(at: StepInfo) -> Tensor:
        return Draws(3).normal(f"{at.step}/{at.stage}", x.shape[1:], [0])

    whole = integrate(solver, denoise, x, grid, path=data.path, noise=noise)
    declared = [(i, stage, t) for i in range(6) for stage, t in solver.evaluations(i, grid, i == 0)]
    if solver.adaptive:
        stages = {(i, stage) for i, stage, _ in declared}
        assert {(i, stage) for i, stage, _ in seen} == stages, f"evaluations declares {declared}, step made {seen}"
        assert all(grid[i + 1] - 1e-7 <= t <= grid[i] + 1e-7 for i, _, t in seen), "a time outside of its step"
    else:
        assert seen == declared, f"evaluations declares {declared}, step made {seen}"
    again = integrate(solver, data.denoise, x, grid, path=data.path, noise=noise)
    integrate(solver, data.denoise, x, grid, path=data.path, noise=noise, start=3)  # without a memory, anywhere
    assert torch.equal(whole, again), "something is remembered outside the memory value"


def _check_distribution(solver: Solver, data: GaussianData) -> None:
    """A stochastic solver must still draw from the data distribution."""
    x = Draws(4).normal("x", (20_000,), [0]).double()
    grid = TimeGrid(200).times()

    def noise(at: StepInfo) -> Tensor:
        return Draws(5).normal(f"{at.step}/{at.stage}", (20_000,), [0]).double()

    found = integrate(solver, data.denoise, x, grid, path=data.path, noise=noise)
    assert abs(found.mean() - data.mean) < 0.02, f"mean {found.mean():.3f}, should be {data.mean}"
    assert abs(found.std() - data.std) < 0.03, f"deviation {found.std():.3f}, should be {data.std}"
