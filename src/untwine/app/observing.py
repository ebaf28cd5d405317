"""A solver that can be watched, and a subject whose measuring can be stopped: neither changes a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from untwine.app.jobs import Job
from untwine.contracts import Prediction
from untwine.diffusion.paths import Path
from untwine.diffusion.solvers import Evaluate, Memory, Noise, Solver

See = Callable[[int, int, Tensor, Tensor, Prediction], None]
"""(step, stage, x, t, prediction)"""


class Observed(Solver):
    """``solver``, with every network evaluation told to ``see`` before the solver hears of it."""

    def __init__(self, solver: Solver, see: See) -> None:
        self.solver, self.see = solver, see
        self.stochastic, self.averages, self.adaptive = solver.stochastic, solver.averages, solver.adaptive  # type: ignore[misc]

    def init(self, x: Tensor) -> Memory:
        return self.solver.init(x)

    def evaluations(self, i: int, grid: Tensor, first: bool) -> tuple[tuple[int, float], ...]:
        return self.solver.evaluations(i, grid, first)

    def step(
        self, denoise: Evaluate, x: Tensor, memory: Memory, i: int, grid: Tensor, path: Path, noise: Noise
    ) -> tuple[Tensor, Memory]:
        def told(x: Tensor, t: Tensor, stage: int) -> Prediction:
            prediction = denoise(x, t, stage)
            self.see(i, stage, x, t, prediction)
            return prediction

        return self.solver.step(told, x, memory, i, grid, path, noise)


class Stoppable:
    """What a probe measures, that stops with its job: the model is asked for at every step."""

    def __init__(self, pipe: Any, job: Job) -> None:
        self._pipe, self._job = pipe, job

    @property
    def model(self) -> Any:
        self._job.check()
        return self._pipe.model

    @property
    def path(self) -> Path:
        return self._pipe.path

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._pipe.latent_shape

    def in_turn(self, index: Tensor) -> Any:
        """What the images are conditioned on."""
        return self._pipe.in_turn(index)
