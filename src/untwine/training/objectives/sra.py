"""Self-representation alignment (SRA, arXiv 2505.02831): the model's average teaches it, no encoder is needed.

The tokens after an early block, projected, are pulled towards those after a later block of the averaged model, which
sees the same image with the same noise at less noise, under the same labels:

    t* = max(t - gap u, 0),   u uniform in [0, 1);      loss = distance(projector(h_site(x_t, t)), h*_teacher(x_t*, t*))

Published settings: sites 4 -> 8 of SiT-B (``blocks.3``, ``blocks.7``), 8 -> 20 of SiT-XL, gap 0.2; smooth L1 with
weight 0.2, constant for 149 epochs of 5004 steps, then falling tenfold in 1000 epochs (in 800 after 99 at 512 pixels);
since July 2026 ``cosine_over_tokens`` with weight 0.5. DiT: weight 0.04.

:class:`DualTime` (arXiv 2607.02508) is flow matching with several levels of noise in one image, between whose tokens
there is no attention; the teacher then sees every group at a lower level of its own.

Differs from the reference (github.com/vvvvvjdy/SRA): the projector belongs to this term, not to the network; a chain of
discrete levels reaches its lowest one, where the reference stops one above; in evaluation the student is projected too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untwine.contracts import Batch, Loss, Output
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import LinearPath, Path
from untwine.diffusion.timesteps import TimeDraw, UniformTime
from untwine.training.objectives.base import PathDraw, Role, Term, projector_of, width_at
from untwine.training.objectives.flow_matching import FlowMatching

Distance = Literal["smooth_l1", "l1", "l2", "cosine", "cosine_over_tokens"]


class SelfAlignment(Term):
    """Alignment with the averaged model.

    Args:
        site: whose tokens are projected, 0-based.
        teacher_site: whose tokens of the averaged model are the target.
        gap: largest difference between both times, in [0, 1].
        distance: mean over the elements; "cosine" is ``1 - cos`` over the width, one value a token, as the paper has
            it; "cosine_over_tokens" over the tokens, one value a channel, as the published code does.
        ema: which average of the recipe teaches.
        width: of the tokens at both sites; None = the model's.
        scale: of the loss; 0.2 belongs to smooth L1.
        hold_steps: optimizer steps with the full scale.
        decay_steps: in which the scale falls tenfold after that; None = it does not.
    """

    def __init__(
        self,
        *,
        site: str = "blocks.3",
        teacher_site: str = "blocks.7",
        gap: float = 0.2,
        distance: Distance = "smooth_l1",
        ema: int = 0,
        width: int | None = None,
        scale: float = 0.2,
        hold_steps: int = 0,
        decay_steps: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= gap <= 1:
            raise ValueError(f"gap must be within [0, 1], got {gap}")
        if hold_steps < 0 or (decay_steps is not None and decay_steps < 1):
            raise ValueError(f"hold_steps must be >= 0 and decay_steps >= 1, got {hold_steps} and {decay_steps}")
        self.sites, self.teacher_site, self.gap, self.ema = (site,), teacher_site, gap, ema
        self.scale, self.hold_steps, self.decay_steps = scale, hold_steps, decay_steps
        self.distance: Distance = distance
        self.projector = nn.Identity() if width is None else projector_of((width, 2 * width, width))

    def networks(self) -> dict[str, Role]:
        return {"teacher": Role(trainable=False, source=f"ema:{self.ema}")}

    def bind(self, model: nn.Module) -> None:
        if isinstance(self.projector, nn.Identity):
            width = width_at(model, self.sites[0])
            self.projector = projector_of((width, 2 * width, width_at(model, self.teacher_site)))

    def scale_at(self, step: int) -> float:
        if self.decay_steps is None:
            return self.scale
        return self.scale * 0.1 ** (max(0, step - self.hold_steps) / self.decay_steps)

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        target = self._taught(draw, networks["teacher"])
        tokens = output.features[self.sites[0]][:, : target.shape[1]]  # those of a condition stand at the end
        found = distance(self.projector(tokens).float(), target[:, : tokens.shape[1]].float(), self.distance)
        return {"sra": found.flatten(1).mean(1)}

    @torch.no_grad()
    def _taught(self, draw: PathDraw, teacher: nn.Module) -> Tensor:
        """(B, N, D) what the teacher sees in the same sample at less noise."""

        def earlier(t: Tensor, name: str = "sra") -> Tensor:
            return draw.path.snap((t - self.gap * draw.uniform(name)).clamp(min=0))

        if isinstance(draw, MixedDraw):
            t, place = draw.mixed([earlier(t, _stream("sra", g)) for g, t in enumerate(draw.times)])
            x_t, given = draw.at(place)[0], {"attention_mask": draw.attention_mask}
        else:
            t, given = earlier(draw.t), {}
            x_t = draw.path.interpolate(draw.x0, draw.noise, t)
        return teacher(x_t, t, draw.condition, features=(self.teacher_site,), **given).features[self.teacher_site]


def distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Elementwise (B, N, D) between tokens of that shape; a cosine leaves (B, N), or (B, D) over tokens."""
    if kind in ("cosine", "cosine_over_tokens"):
        return 1 - F.cosine_similarity(a, b, dim=-1 if kind == "cosine" else 1)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(a, b, beta=0.05, reduction="none")
    return (a - b).abs() if kind == "l1" else (a - b).square()


def _stream(name: str, group: int) -> str:
    """The stream of a group's draws; the first group has the plain one."""
    return f"{name}/{group}" if group else name


def token_groups(noise: Tensor, fractions: Sequence[float]) -> Tensor:
    """(B, N) the group of each token: those of least noise (B, N) are the first one's, and so on.

    ``fractions`` of N are rounded to whole numbers that sum to N, those of the largest remainders upwards.
    """
    shares = torch.tensor(fractions, dtype=torch.float32) * noise.shape[1]
    counts = shares.floor().long()
    counts[torch.topk(shares - counts, noise.shape[1] - int(counts.sum())).indices] += 1
    ordered = torch.arange(len(counts)).repeat_interleave(counts).to(noise.device)
    return torch.empty_like(noise, dtype=torch.int64).scatter(1, noise.argsort(1), ordered.expand(noise.shape))


@dataclass(frozen=True)
class MixedDraw(PathDraw):
    """A draw whose tokens are in groups, each with a time of its own; ``t`` is a sample's mean."""

    times: tuple[Tensor, ...] = ()
    """(B,) a group"""
    groups: Tensor | None = None
    """(B, N) int64"""
    patch_size: int = 1

    @property
    def attention_mask(self) -> Tensor:
        """(B, N, N) bool: only tokens of one group attend to each other."""
        assert self.groups is not None
        return self.groups[:, :, None] == self.groups[:, None]

    def mixed(self, times: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Times (B,) of the groups as (B, N), and on the pixels as (B, 1, H, W)."""
        assert self.groups is not None
        t, p = torch.stack(tuple(times), 1).gather(1, self.groups), self.patch_size
        return t, F.interpolate(t.view(len(t), 1, self.x0.shape[2] // p, -1), scale_factor=p, mode="nearest")

    def at(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy samples and their velocity, at times (B, 1, H, W)."""
        c = self.path.at(place)
        return c.alpha * self.x0 + c.sigma * self.noise, c.d_alpha * self.x0 + c.d_sigma * self.noise


class DualTime(FlowMatching):
    """Several levels of noise in one image; in evaluation plain flow matching, for which such a model is sampled.

    For velocity predictors of one token a patch, which take times and masks per token.

    Args:
        path, time, label_dropout, terms: as :class:`FlowMatching`; each group draws a time.
        fractions: of the tokens in each group, which sum to 1.
    """

    def __init__(
        self,
        *,
        path: Path = LinearPath(),  # noqa: B008 - a frozen value
        time: TimeDraw = UniformTime(),  # noqa: B008
        fractions: tuple[float, ...] = (0.25, 0.75),
        label_dropout: float = 0.1,
        terms: tuple[Term, ...] = (),
    ) -> None:
        super().__init__(path=path, time=time, label_dropout=label_dropout, terms=terms)
        if len(fractions) < 2 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be two or more numbers > 0 that sum to 1, got {fractions}")
        self.fractions = fractions

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        if not self.training:
            return super().forward(networks, batch, update=update, step=step, draws=draws)
        model = networks["model"]
        if model.predicts != "velocity" or getattr(model.config, "class_token_dim", 0):
            raise ValueError("dual_time needs a velocity predictor of images alone, such as sit, ddt or lightningdit")
        draw, t = self.mixed_draw(model, batch, draws)
        output = model(draw.x_t, t, draw.condition, attention_mask=draw.attention_mask, features=self.sites)
        return self.total(draw, output, networks, step)

    def mixed_draw(self, model: Any, batch: Batch, draws: Draws) -> tuple[MixedDraw, Tensor]:
        """The draw, and the times of the tokens (B, N)."""
        times = tuple(self.times(batch, draws, _stream("t", g)) for g in range(len(self.fractions)))
        plain, patch = self.draw(model, batch, draws, t=times[0]), model.config.patch_size
        shape = (batch.x0.shape[2] // patch * (batch.x0.shape[3] // patch),)
        groups = token_groups(draws.uniform("groups", shape, batch.index, device=batch.x0.device), self.fractions)
        given = {f.name: getattr(plain, f.name) for f in fields(plain)}
        draw = MixedDraw(**given, times=times, groups=groups, patch_size=patch)
        t, place = draw.mixed(times)
        x_t, target = draw.at(place)
        return replace(draw, t=t.mean(1), x_t=x_t, target=target), t
