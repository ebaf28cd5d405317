"""Share: how alike the encoder states of a run are, at which steps to run the encoder, and what it saves and costs."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from untwine.app.jobs import Job
from untwine.app.limits import Refused, one_of, whole
from untwine.app.requests import Request
from untwine.app.studio import Studio

if TYPE_CHECKING:
    from untwine.diffusion.sampling import Sampling
    from untwine.pipelines.image import ImagePipeline

PROBE_IMAGES = 8
COSTS = ("similarity", "uniform")
"""how the steps are chosen: by the states' similarity, as published, or evenly spread"""
PREDICTORS = {"reuse the last state": 0, "forecast, line": 1, "forecast, parabola": 2, "forecast, cubic": 3}


@dataclass(frozen=True)
class Measured:
    """A sampler of a decoupled model, and how alike its encoder states are."""

    request: Request
    similarity: np.ndarray
    """(N, N) mean cosine of the states of two steps"""

    def refresh(self, budget: Any, cost: Any) -> tuple[int, ...]:
        """The steps that run the encoder; cheap, so that a slider can ask for it.

        Raises:
            Refused: for a budget out of range or a cost that does not exist.
        """
        import torch

        from untwine.acceleration.sharing.plan import choose_steps

        steps = len(self.similarity)
        budget = whole("budget", budget, 1, steps)
        error = torch.from_numpy(1 - self.similarity) if one_of("cost", cost, COSTS) == "similarity" else None
        return choose_steps(error, steps, budget)[0]


@dataclass(frozen=True)
class Side:
    """One of the two runs that are compared."""

    images: np.ndarray
    """(N, H, W, C) uint8"""
    seconds: float
    network_evaluations: int
    """an image"""
    encoder_passes: int
    """an image"""


@dataclass(frozen=True)
class Compared:
    """The exact run and the accelerated one, of the same noise."""

    exact: Side
    shared: Side
    refresh: tuple[int, ...]
    plan: Path
    """a file that ``untwine sample --plan`` takes"""

    @property
    def difference(self) -> np.ndarray:
        """(N, H, W, C) absolute difference in grey levels."""
        return np.abs(self.exact.images.astype(np.int16) - self.shared.images.astype(np.int16)).astype(np.uint8)


def measure(studio: Studio, request: Request, job: Job) -> Measured:
    """Measures the similarity on a few images of the classes in turn.

    Raises:
        ValueError: for a model that has no encoder state to share.
    """
    from untwine.acceleration.sharing.probe import check_subject, similarity
    from untwine.app.observing import Observed, Stoppable

    job.begin("measuring the encoder states")
    pipe = studio.pipe(request.entry)
    check_subject(pipe)
    settings = request.settings(pipe)
    told = Observed(settings.solver, lambda i, stage, x, t, prediction: job.at(i + 1, request.steps))
    found = similarity(Stoppable(pipe, job), replace(settings, solver=told), num_images=PROBE_IMAGES, seed=request.seed)
    return Measured(request, found.numpy())


def compare(studio: Studio, measured: Measured | None, budget: Any, order: Any, cost: Any, job: Job) -> Compared:
    """Draws the same images without and with sharing, and writes the plan.

    Args:
        order: degree of the forecast between the refreshes, 0-3; 0 reuses the last state.
    """
    from untwine.acceleration.sharing.plan import SharingPlan, model_hash

    if measured is None:
        raise Refused("nothing is measured yet; press Measure first")
    refresh, order = measured.refresh(budget, cost), whole("predictor", order, 0, 3)
    request, pipe = measured.request, studio.pipe(measured.request.entry)
    exact = request.settings(pipe)
    shared = replace(exact, refresh=refresh, forecast_order=order if len(refresh) < request.steps else 0)
    job.begin("warming up")
    request.series(pipe, sampling=replace(exact, num_inference_steps=1)).draw(0)
    job.begin("drawing, exact")
    slow = _side(request, pipe, exact, job)
    job.begin("drawing, accelerated")
    fast = _side(request, pipe, shared, job)
    path = studio.outputs.new() / "plan.json"
    made = {"cost": cost, "num_images": PROBE_IMAGES, "seed": request.seed}
    SharingPlan(shared, model_hash(pipe.model), None, made).save(path)
    studio.outputs.trim()
    return Compared(slow, fast, refresh, path)


def _side(request: Request, pipe: ImagePipeline, sampling: Sampling, job: Job) -> Side:
    series = request.series(pipe, sampling=sampling)
    started = time.perf_counter()
    drawn = series.draw(0, on_step=job.step)
    seconds = time.perf_counter() - started
    return Side(drawn.images, seconds, drawn.evaluations // request.count, drawn.refreshes // request.count)
