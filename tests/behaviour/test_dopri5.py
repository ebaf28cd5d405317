"""The adaptive solver: within its tolerances of a fine grid of Heun's, its evaluations counted, its needs named."""

from __future__ import annotations

import sys

import pytest
import torch

from untwine.contracts import Condition
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import CosinePath, LinearPath
from untwine.diffusion.sampling import Sampling, integrate, sample
from untwine.diffusion.solvers import Dopri5, Heun
from untwine.diffusion.timesteps import TimeGrid
from untwine.models.ddt import DDT
from untwine.testing.diffusion import GaussianData

pytest.importorskip("torchdiffeq")
ONCE = TimeGrid(1).times()


def network() -> DDT:
    torch.manual_seed(0)
    model = DDT(in_channels=1, hidden_size=32, depth=3, encoder_depth=2, num_heads=2, num_classes=4).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def drawn(solver, steps: int, **settings):
    sampling = Sampling(solver=solver, num_inference_steps=steps, guidance_scale=1.5, **settings)
    condition = Condition(labels=torch.tensor([0, 3]))
    return sample(network(), condition, (1, 8, 8), torch.arange(2), draws=Draws(0), sampling=sampling)


def test_it_is_a_fine_grid_of_heuns():
    """A network with guidance; float32."""
    fine, _ = drawn(Heun(), 200)
    found, guided = drawn(Dopri5(rtol=1e-6, atol=1e-6), 1)
    coarse, cheap = drawn(Dopri5(), 1)
    assert (found - fine).abs().max() <= 1e-4
    assert (coarse - fine).abs().max() <= 1e-3 * fine.abs().max()
    assert cheap.num_evaluations < guided.num_evaluations < 2 * 399


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()])
def test_the_exact_solution(path):
    data, x = GaussianData(path), Draws(2).normal("x", (64,), [0]).double()
    found = integrate(Dopri5(1e-8, 1e-8), data.denoise, x, ONCE, path=path)
    assert (found - data.solution(x, *ONCE)).abs().max() < 1e-6
    back = integrate(Dopri5(1e-8, 1e-8), data.denoise, found, ONCE.flip(0), path=path)  # inversion: a rising grid
    assert (back - x).abs().max() < 1e-5


@pytest.mark.parametrize("num_steps", [1, 3])
def test_evaluations_are_counted_and_lie_between_the_times_of_the_grid(num_steps):
    """The tighter the tolerance the more of them; both branches of guidance count."""
    data, grid, seen = GaussianData(LinearPath()), TimeGrid(num_steps).times(), []

    def denoise(x, t, at):
        seen.append((at.step, float(t)))
        return data.denoise(x, t, at)

    x = Draws(2).normal("x", (64,), [0]).double()
    counts = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        seen.clear()
        integrate(Dopri5(tolerance, tolerance), denoise, x, grid, path=data.path)
        assert all(grid[i + 1] - 1e-7 <= t <= grid[i] + 1e-7 for i, t in seen)
        assert {i for i, _ in seen} == set(range(num_steps))
        counts.append(len(seen))
    assert counts == sorted(counts) and counts[0] < counts[-1]
    _, guided = drawn(Dopri5(), num_steps)
    assert guided.num_evaluations % 2 == 0 and guided.num_evaluations >= 2 * 8 * num_steps


def test_a_network_of_two_parts_is_encoded_anew_each_time():
    _, guided = drawn(Dopri5(), 1)
    assert guided.num_refreshes == guided.num_evaluations


@pytest.mark.parametrize(
    "options", [{"guidance_interval": (0.1, 0.9)}, {"internal_interval": (0.1, 0.9)}, {"refresh_every": 2}], ids=str
)
def test_velocities_that_jump_are_refused(options):
    with pytest.raises(ValueError, match=r"(interval|refresh): Dopri5 chooses its own times .* such as heun"):
        Sampling(solver=Dopri5(), num_inference_steps=2, **options)
    with pytest.raises(ValueError, match="refresh: Dopri5 chooses its own times"):
        integrate(Dopri5(), lambda x, t, at: x, torch.zeros(1, 1), ONCE, path=LinearPath(), refresh=(0,))


def test_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match=r"rtol and atol must be finite and > 0, got 0\.0 and 1e-06"):
        Dopri5(rtol=0.0)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"pip install untwine\[ode\]"):
        drawn(Dopri5(), 1)
