"""MeanFlow (arXiv 2505.13447): a network of two times predicts the mean velocity over [r, t], for samples in 1-4 steps.

``u(x_t, r, t) = v - (t - r) du/dt``, with ``du/dt`` along the trajectory from one forward-mode derivative. A coin, one
for all samples and ranks of a step, makes most steps plain flow matching (r = t). Guidance is trained in:
``v_g = omega v + (1 - omega - kappa) u_null + kappa u_cond``, both at r = t (eq. 19-20).

Differs from the reference (github.com/End2End-Diffusion/diffusion-bench): the coin is a function of (seed, step); in
evaluation the loss is the plain flow's of instantaneous velocities, so that it compares with other objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from untwine.contracts import Batch, Condition, Loss, Output
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import ending
from untwine.diffusion.paths import LinearPath, Path
from untwine.diffusion.timesteps import LogitNormalTime, TimeDraw
from untwine.training.objectives.base import PathDraw, Term, squared_error
from untwine.training.objectives.flow_matching import FlowMatching


class MeanFlowTerm(Term):
    """``L / (L + 0.01)^power`` of the summed squared error L of a sample, the divisor detached (eq. 22)."""

    def __init__(self, *, power: float = 1.0, epsilon: float = 0.01, scale: float = 1.0) -> None:
        super().__init__()
        if not epsilon > 0:
            raise ValueError(f"epsilon must be > 0, got {epsilon}")
        self.power, self.epsilon, self.scale = power, epsilon, scale

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        error = squared_error(output.sample, draw, networks["model"])
        if not self.training:
            return {"flow": error}
        summed = error * draw.x0[0].numel()
        return {"mean_flow": summed / (summed.detach() + self.epsilon) ** self.power}


class MeanFlow(FlowMatching):
    """Mean velocities of a velocity predictor with ``second_time``.

    Args:
        path, time, label_dropout, terms: as :class:`FlowMatching`; ``time`` is that of both ends.
        flow_ratio: fraction of the steps, in [0, 1], that are plain flow matching.
        omega, kappa: weights of the guided target; 1 and 0 train without guidance.
        guidance_interval: (low, high) times within which, ends included, the target is guided.
        power: of the adaptive weight, see :class:`MeanFlowTerm`.
    """

    def __init__(
        self,
        *,
        path: Path = LinearPath(),  # noqa: B008 - a frozen value
        time: TimeDraw = LogitNormalTime(mean=-0.4),  # noqa: B008
        flow_ratio: float = 0.75,
        omega: float = 1.0,
        kappa: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        power: float = 1.0,
        label_dropout: float = 0.1,
        terms: tuple[Term, ...] = (),
    ) -> None:
        super().__init__(path=path, time=time, label_dropout=label_dropout)
        if not 0 <= flow_ratio <= 1:
            raise ValueError(f"flow_ratio must be within [0, 1], got {flow_ratio}")
        self.terms = nn.ModuleList([MeanFlowTerm(power=power), *terms])
        self.flow_ratio, self.omega, self.kappa, self.guidance_interval = flow_ratio, omega, kappa, guidance_interval

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        model = networks["model"]
        _check(model)
        t = r = self.times(batch, draws)
        is_flow = not self.training or draws.shared("mean_flow", step) < self.flow_ratio
        if not is_flow:
            other = self.times(batch, draws, "r")
            t, r = torch.maximum(t, other), torch.minimum(t, other)
        draw = self.draw(model, batch, draws, t=t)
        draw = replace(draw, target=self.guided(model, batch, draw, draws))
        if is_flow:
            output = model(draw.x_t, t, ending(draw.condition, r), features=self.sites)
        else:
            output = self._along(model, draw.condition, draw, r)
        loss = self.total(draw, output, networks, step)
        return replace(loss, per_sample=squared_error(output.sample, draw, model).detach())

    @torch.no_grad()
    def guided(self, model: Any, batch: Batch, draw: PathDraw, draws: Draws) -> Tensor:
        """The target velocities, guided where a label is kept and t is within the interval."""
        given = batch.condition
        if not self.training or not given.keys() or (self.omega == 1 and self.kappa == 0):
            return draw.target
        low, high = self.guidance_interval
        is_guided, kept = (draw.t >= low) & (draw.t <= high), self.kept(batch, draws)
        is_guided = is_guided if kept is None else is_guided & kept
        null = batch.null if batch.null is not None else model.null(given)
        target = self.omega * draw.target
        for weight, condition in ((1 - self.omega - self.kappa, null), (self.kappa, given)):
            if weight:
                target = target + weight * model(draw.x_t, draw.t, ending(condition, draw.t)).sample.float()
        return torch.where(is_guided.view(-1, *[1] * (target.ndim - 1)), target, draw.target)

    def _along(self, model: Any, condition: Condition, draw: PathDraw, r: Tensor) -> Output:
        """The output with ``u + (t - r) du/dt`` as its sample, du/dt detached: what the target is compared with."""
        predict = model.forward

        def mean_velocity(x: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Any]:
            output = predict(x, t, ending(condition, r), features=self.sites)
            return output.sample.float(), (output.features, output.extra, output.losses)

        def derive(x: Tensor, t: Tensor, r: Tensor) -> Any:
            return torch.func.jvp(mean_velocity, (x, t, r), tangents, has_aux=True)

        tangents = (draw.target, torch.ones_like(draw.t), torch.zeros_like(r))
        # Fused attention has no forward-mode derivative, and neither have the hooks of replicas, which stay outside.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), _running(model, derive):
            u, change, rest = model(draw.x_t, draw.t, r)
        duration = (draw.t - r).view(-1, *[1] * (u.ndim - 1))
        return Output(u + duration * change.detach(), *rest)


@contextmanager
def _running(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, a call of ``model`` runs ``forward`` between its hooks."""
    before = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _check(model: Any) -> None:
    if "vectors.r" not in model.accepts or model.predicts != "velocity":
        raise ValueError("mean_flow needs a velocity predictor of two times: second_time: true, conditioning: tokens")
    if getattr(getattr(model, "config", None), "class_token_dim", 0):
        raise ValueError("mean_flow cannot train a class token; build the model with class_token_dim = 0")
