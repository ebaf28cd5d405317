"""Flow matching (Lipman et al., arXiv 2210.02747; DDT, arXiv 2504.05741, section 3): one draw, one call, many terms.

Differs from the reference: label dropout and all draws are functions of the sample counter, so that a run does not
depend on the number of processes; in evaluation mode times are uniform and labels are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from untwine.contracts import Batch, Condition, Draw, Loss, Output
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import LinearPath, Path
from untwine.diffusion.timesteps import LogitNormalTime, TimeDraw, UniformTime
from untwine.training.objectives.base import Objective, Term

Weighting = Literal["constant", "inverse_variance", "snr", "snr_floor", "snr_cap"]


def time_weight(weighting: Weighting, path: Path, t: Tensor, *, clip: float = 5.0) -> Tensor | None:
    """(B,) loss weights: ``1 / sigma^2``, ``r = alpha / sigma``, ``max(r, clip)``, ``min(r, clip)``; constant is None.

    The official DDT code calls the last two minsnr and maxsnr.
    """
    if weighting == "constant":
        return None
    c = path.at(t)
    sigma = c.sigma.clamp(min=1e-3)
    if weighting == "inverse_variance":
        return 1 / sigma**2
    ratio = c.alpha / sigma
    return {"snr": ratio, "snr_floor": ratio.clamp(min=clip), "snr_cap": ratio.clamp(max=clip)}[weighting]


class FlowTerm(Term):
    """Mean squared error of the prediction, in float32, weighted per sample."""

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, draw: Draw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"flow": (output.sample.float() - draw.target).square().flatten(1).mean(1)}


class FlowMatching(Objective):
    """One :class:`Draw`, one model call that returns the sites its terms ask for, and the sum of the terms.

    Args:
        path: between data and noise.
        time: distribution of the training times.
        weighting: loss weight as a function of t, see :func:`time_weight`.
        label_dropout: probability in [0, 1) with which a sample is trained under the null condition.
        terms: summands besides the flow term.
    """

    def __init__(
        self,
        *,
        path: Path = LinearPath(),  # noqa: B008 - a frozen value
        time: TimeDraw = LogitNormalTime(),  # noqa: B008
        weighting: Weighting = "constant",
        label_dropout: float = 0.1,
        terms: tuple[Term, ...] = (),
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must be within [0, 1), got {label_dropout}")
        self.path, self.time, self.label_dropout = path, time, label_dropout
        self.weighting: Weighting = weighting
        self.terms = nn.ModuleList([FlowTerm(), *terms])

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        model = networks["model"]
        draw = self.draw(model, batch, draws)
        sites = tuple(sorted({site for term in self.terms for site in term.sites}))  # type: ignore[union-attr]
        output = model(draw.x_t, draw.t, self.condition(model, batch, draws), features=sites)
        total, parts, per_sample = torch.zeros((), device=draw.x_t.device), {}, None
        for term in self.terms:
            for name, value in term(draw, output, networks).items():
                if name == "flow":
                    per_sample = value.detach()
                weighted = value if draw.weight is None or value.ndim == 0 else value * draw.weight
                total = total + term.scale * weighted.mean()
                parts[name] = value.detach().mean()
        for name, value in output.losses.items():
            total = total + value
            parts[name] = value.detach()
        return Loss(total, parts, per_sample, draw.t)

    def draw(self, model: Any, batch: Batch, draws: Draws) -> Draw:
        """The random draw of a micro-batch: a function of (seed, sample counter)."""
        device = batch.x0.device
        time = self.time if self.training else UniformTime()
        t = time.sample(draws, batch.index, device=device)
        noise = draws.normal("noise", batch.x0.shape[1:], batch.index, device=device)
        weight = time_weight(self.weighting, self.path, t)
        if batch.weight is not None:
            weight = batch.weight if weight is None else weight * batch.weight
        x_t = self.path.interpolate(batch.x0, noise, t)
        target = self.path.target(model.predicts, batch.x0, noise, t)
        return Draw(batch.x0, noise, t, x_t, target, weight, batch.known, batch.features)

    def condition(self, model: Any, batch: Batch, draws: Draws) -> Condition:
        """The condition, null where the label dropout strikes."""
        if not self.training or self.label_dropout == 0 or not batch.condition.keys():
            return batch.condition
        u = draws.uniform("label_dropout", (), batch.index, device=batch.x0.device)
        return batch.condition.where(u >= self.label_dropout, model.null(batch.condition))
