"""What sharing an encoder state costs, measured on fully recomputed runs.

Two costs ``error[j, l]`` of using at step l what the encoder said at step j:

- ``similarity``: ``1 - cos`` of the two states, the published cost (DDT, arXiv 2504.05741, section 3.4);
- ``velocity``: the error of the guided velocity, which is what the solver sees. An addition of untwine.

Differs from the reference: labels are the classes in turn, not random; the states are never all in memory; the probe
always recomputes every state, whatever refreshes the settings name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from untwine.contracts import Condition, StepInfo, cat
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import Guided
from untwine.diffusion.paths import Path
from untwine.diffusion.sampling import Sampling, guided_by, integrate, noises


class Subject(Protocol):
    """What is measured: an :class:`~untwine.pipelines.image.ImagePipeline`, or anything with these."""

    @property
    def model(self) -> Any: ...
    @property
    def path(self) -> Path: ...
    @property
    def latent_shape(self) -> tuple[int, ...]: ...
    def in_turn(self, index: Tensor) -> tuple[Condition, Condition | None]:
        """What the images ``index`` (B,) are conditioned on, and their null where the model does not know it."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """The first evaluation of one solver step."""

    x: Tensor
    t: Tensor
    at: StepInfo
    velocity: Tensor
    """guided"""


def unshared(sampling: Sampling) -> Sampling:
    """The same settings with the encoder run at every evaluation."""
    return replace(sampling, refresh_every=1, refresh=None, forecast_order=0, retime=False)


def check_subject(pipe: Subject) -> None:
    """Raises ValueError for a model that cannot share, or whose forward is changed by an attachment."""
    name = type(pipe.model).__name__
    if not pipe.model.decoupled:
        raise ValueError(f"model: {name} has no encoder state to share between steps; use a decoupled one such as ddt")
    if getattr(pipe.model, "attached", ()):
        raise ValueError(f"model: {name} has something attached, which would be measured as well; detach it first")


def denoiser(pipe: Subject, sampling: Sampling, index: Tensor) -> Guided:
    """Of the images ``index`` (B,), conditioned in turn."""
    condition, null = (None if c is None else c.to(pipe.model.device) for c in pipe.in_turn(index))
    assert condition is not None
    return guided_by(sampling, pipe.model, condition, sampling.grid(pipe.path), pipe.path, null)


@torch.no_grad()
def trajectory(pipe: Subject, sampling: Sampling, index: Tensor, *, seed: int = 0) -> list[Evaluation]:
    """The evaluations that open each of the N steps of a fully recomputed run of the images ``index`` (B,)."""
    check_subject(pipe)
    sampling, grid = unshared(sampling), sampling.grid(pipe.path)
    device = pipe.model.device
    guided = denoiser(pipe, sampling, index)
    seen: dict[int, Evaluation] = {}

    def denoise(x: Tensor, t: Tensor, at: StepInfo):
        prediction = guided(x, t, at)
        seen.setdefault(at.step, Evaluation(x, t, at, prediction.velocity))
        return prediction

    x, noise = noises(Draws(seed), tuple(pipe.latent_shape), index, device=device)
    integrate(sampling.solver, denoise, x, grid, path=pipe.path, noise=noise)
    return list(seen.values())


def gram(states: Tensor, *, rows: int = 256) -> Tensor:
    """Sums of cosines ``G[i, j] = sum_r cos(states[i, r], states[j, r])`` of (N, R, D), as (N, N) float64."""
    total = torch.zeros(len(states), len(states), dtype=torch.float64, device=states.device)
    for part in states.split(rows, dim=1):
        unit = F.normalize(part.double(), dim=-1).flatten(1)
        total += unit @ unit.T
    return total


@torch.no_grad()
def similarity(
    pipe: Subject, sampling: Sampling, *, num_images: int = 8, seed: int = 0, micro_batch: int = 8
) -> Tensor:
    """``S[i, j]``, the mean cosine of the states of steps i and j over branches, images and tokens: (N, N) float64.

    Memory: the states of one micro-batch, ``N x branches x micro_batch x tokens x D`` floats; at DDT-XL and 250 steps
    that is 0.6 GB an image.
    """
    check_subject(pipe)
    num_steps, count = sampling.num_inference_steps, 0
    total = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for index in _parts(num_images, micro_batch):
        run = trajectory(pipe, sampling, index, seed=seed)
        both = [branch.condition for branch in denoiser(pipe, sampling, index).branches.values()]
        states = torch.stack([_state(pipe.model, e, both).flatten(0, 1).float() for e in run])
        total += gram(states).cpu()
        count += states.shape[1]
    return total / count


def _state(model: Any, e: Evaluation, conditions: Sequence[Condition]) -> Tensor:
    """(branches B, tokens, D)"""
    x = torch.cat([e.x] * len(conditions))
    times = torch.full((len(x),), float(e.t), dtype=torch.float32, device=x.device)
    return model.encode(x, times, cat(conditions)).tokens


@torch.no_grad()
def velocity_error(
    pipe: Subject, sampling: Sampling, *, num_images: int = 8, seed: int = 0, micro_batch: int = 8, spacing: int = 1
) -> Tensor:
    """``error[j, l]`` for j <= l: root mean square error of the guided velocity at step l after a refresh at j.

    Of whatever ``sampling`` gives the decoder in between: a reused state, one with the time mixed in anew, or a
    forecast, whose earlier refreshes are taken to lie ``spacing`` steps apart. Each j costs ``forecast_order + 1``
    encoder passes, each entry a decoder pass (N^2 / 2 in all); the states in memory are those that one forecast needs.

    Returns:
        (N, N) float64, 0 on and below the diagonal.
    """
    check_subject(pipe)
    num_steps = sampling.num_inference_steps
    squares = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for index in _parts(num_images, micro_batch):
        run = trajectory(pipe, sampling, index, seed=seed)
        for j in range(num_steps):
            guided = denoiser(pipe, sampling, index)
            for k in range(max(j % spacing, j - sampling.forecast_order * spacing), j + 1, spacing):
                ahead = tuple((e.at.step, e.at.stage, float(e.t)) for e in run[k:])
                guided(run[k].x, run[k].t, replace(run[k].at, refresh=True, ahead=ahead))
            for e in run[j + 1 :]:
                velocity = guided(e.x, e.t, replace(e.at, refresh=False, ahead=())).velocity
                squared = (velocity - e.velocity).double().square().mean().cpu()
                squares[j, e.at.step] += squared * len(index) / num_images
    return squares.sqrt()


def _parts(num_images: int, micro_batch: int) -> Iterable[Tensor]:
    for name, value in (("num_images", num_images), ("micro_batch", micro_batch)):
        if isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return torch.arange(num_images).split(micro_batch)
