"""Flow matching (Lipman et al., arXiv 2210.02747; DDT, arXiv 2504.05741, section 3): one draw, one call, many terms.

The same objective trains noise predictors on a discrete chain (DiT), x0 predictors whose loss is taken in velocities
(``loss_in``, with ``path.sigma_floor``), and joint samples: see docs/objectives.md.

Differs from the reference: label dropout and all draws are functions of the sample counter, so that a run does not
depend on the number of processes; in evaluation mode times are uniform and labels are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from untwine.codecs.rae_features import FeatureMaps
from untwine.contracts import Batch, Condition, Loss, Output
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import LinearPath, Path
from untwine.diffusion.timesteps import LogitNormalTime, TimeDraw, UniformTime
from untwine.training.objectives.base import Objective, PathDraw, Role, Term, squared_error

Weighting = Literal["constant", "inverse_variance", "snr", "snr_floor", "snr_cap", "velocity", "likelihood"]


def time_weight(weighting: Weighting, path: Path, t: Tensor, *, clip: float = 5.0) -> Tensor | None:
    """(B,) loss weights: ``1 / sigma^2``, ``r = alpha / sigma``, ``max(r, clip)``, ``min(r, clip)``; constant is None.

    The official DDT code calls those with a clip minsnr and maxsnr. ``velocity`` is ``(g^2 / 2 sigma)^2`` and
    ``likelihood`` ``g^2 / 2 sigma^2``, for noise predictors (SiT, arXiv 2401.08740, section 2.4).
    """
    if weighting == "constant":
        return None
    c = path.at(t)
    sigma = c.sigma.clamp(min=1e-3)
    if weighting == "inverse_variance":
        return 1 / sigma**2
    if weighting in ("velocity", "likelihood"):
        diffusion = path.diffusion(t)
        return (diffusion / sigma) ** 2 if weighting == "velocity" else diffusion / sigma**2
    ratio = c.alpha / sigma
    return {"snr": ratio, "snr_floor": ratio.clamp(min=clip), "snr_cap": ratio.clamp(max=clip)}[weighting]


class FlowTerm(Term):
    """Mean squared error of the prediction, in float32, weighted per sample; of a joint sample, its image's."""

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"flow": squared_error(output.sample, draw, networks["model"])}


class FlowMatching(Objective):
    """One :class:`PathDraw`, one model call that returns the sites its terms ask for, and the sum of the terms.

    Args:
        path: between data and noise; times are those that it has.
        time: distribution of the training times.
        weighting: loss weight as a function of t, see :func:`time_weight`.
        loss_in: in which meaning of the output the error is measured; None = the one that the network predicts.
        label_dropout: probability in [0, 1) with which a sample is trained under the null condition.
        terms: summands besides the flow term.
    """

    def __init__(
        self,
        *,
        path: Path = LinearPath(),  # noqa: B008 - a frozen value
        time: TimeDraw = LogitNormalTime(),  # noqa: B008
        weighting: Weighting = "constant",
        loss_in: Literal["velocity", "noise", "x0"] | None = None,
        label_dropout: float = 0.1,
        terms: tuple[Term, ...] = (),
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must be within [0, 1), got {label_dropout}")
        self.path, self.time, self.label_dropout, self.loss_in = path, time, label_dropout, loss_in
        self.weighting: Weighting = weighting
        self.terms = nn.ModuleList([FlowTerm(), *terms])

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        model = networks["model"]
        draw = self.draw(model, batch, draws)
        output = model(draw.x_t, draw.t, draw.condition, features=self.sites)
        return self.total(draw, self._in_loss_space(output, draw, model.predicts), networks, step)

    def networks(self) -> dict[str, Role]:
        found: dict[str, Role] = {}
        for term in self.terms:
            for name, role in term.networks().items():  # type: ignore[operator]
                if found.setdefault(name, role) != role:
                    raise ValueError(f"terms: two of them want the network {name!r} as {found[name]} and as {role}")
        return found

    def encoders(self) -> tuple[FeatureMaps, ...]:
        return tuple(maps for term in self.terms for maps in term.encoders())  # type: ignore[operator]

    def bind(self, model: nn.Module) -> None:
        for term in self.terms:
            term.bind(model)  # type: ignore[operator]

    @property
    def sites(self) -> tuple[str, ...]:
        """The features that the terms read."""
        return tuple(sorted({site for term in self.terms for site in term.sites}))  # type: ignore[union-attr]

    def total(self, draw: PathDraw, output: Output, networks: Mapping[str, Any], step: int) -> Loss:
        """The sum of the terms, with their scales at ``step``, and of the losses that the model brings itself."""
        total, parts, per_sample = torch.zeros((), device=draw.x_t.device), {}, None
        for term in self.terms:
            for name, value in term(draw, output, networks).items():
                if name == "flow":
                    per_sample = value.detach()
                weighted = value if draw.weight is None or value.ndim == 0 else value * draw.weight
                total = total + term.scale_at(step) * weighted.mean()  # type: ignore[operator]
                parts[name] = value.detach().mean()
        for name, value in output.losses.items():
            total = total + value
            parts[name] = value.detach()
        return Loss(total, parts, per_sample, draw.t)

    def times(self, batch: Batch, draws: Draws, name: str = "t") -> Tensor:
        """(B,) the training times; in evaluation uniform ones."""
        time = self.time if self.training else UniformTime()
        return self.path.snap(time.sample(draws, batch.index, device=batch.x0.device, name=name))

    def draw(self, model: Any, batch: Batch, draws: Draws, *, t: Tensor | None = None) -> PathDraw:
        """The random draw of a micro-batch: a function of (seed, sample counter), at the times t where given."""
        t = self.times(batch, draws) if t is None else t
        x0, kind = _clean(model, batch), self.loss_in or model.predicts
        noise = draws.normal("noise", x0.shape[1:], batch.index, device=x0.device)
        weight = time_weight(self.weighting, self.path, t)
        if batch.weight is not None:
            weight = batch.weight if weight is None else weight * batch.weight
        x_t = self.path.interpolate(x0, noise, t)
        target = self.path.target(kind, x0, noise, t)
        given = x0, noise, t, x_t, target, weight, batch.known, batch.features, self.path, kind
        return PathDraw(*given, self.condition(model, batch, draws), draws, batch.index)

    def condition(self, model: Any, batch: Batch, draws: Draws) -> Condition:
        """The condition, null where the label dropout strikes."""
        kept = self.kept(batch, draws)
        if kept is None:
            return batch.condition
        null = batch.null if batch.null is not None else model.null(batch.condition)
        return batch.condition.where(kept, null)

    def kept(self, batch: Batch, draws: Draws) -> Tensor | None:
        """(B,) bool: whose condition the label dropout spares; None = everyone's."""
        if not self.training or self.label_dropout == 0 or not batch.condition.keys():
            return None
        return draws.uniform("label_dropout", (), batch.index, device=batch.x0.device) >= self.label_dropout

    def _in_loss_space(self, output: Output, draw: PathDraw, predicts: str) -> Output:
        """The predictions of ``output`` in the meaning that the loss is taken in."""
        if draw.kind == predicts:
            return output

        def convert(value: Tensor) -> Tensor:
            return self.path.convert(value.float(), draw.x_t, draw.t, source=predicts, target=draw.kind)

        bases = {name: convert(value) for name, value in output.extra.items() if name == "base"}
        return replace(output, sample=convert(output.sample), extra={**output.extra, **bases})


def _clean(model: Any, batch: Batch) -> Tensor:
    """The clean samples: with the class token of ``batch.features``, where the model diffuses one with the image.

    Samples that are packed already stay as they are.
    """
    if not getattr(getattr(model, "config", None), "class_token_dim", 0) or batch.x0.ndim == 3:
        return batch.x0
    if "class_token" not in batch.features:
        raise ValueError(
            "batch.features lacks 'class_token', which a model with class_token_dim > 0 diffuses with the image"
        )
    return model.pack(batch.x0, batch.features["class_token"])
