"""Self-representation alignment (SRA, arXiv 2505.02831): the model's average teaches it, no encoder is needed.

The tokens after an early block, projected, are pulled towards those after a later block of the averaged model, which
sees the same image with the same noise at less noise, under the same labels:

    t* = max(t - gap u, 0),   u uniform in [0, 1);      loss = distance(projector(h_site(x_t, t)), h*_teacher(x_t*, t*))

Published settings: sites 4 -> 8 of SiT-B (``blocks.3``, ``blocks.7``), 8 -> 20 of SiT-XL, gap 0.2; smooth L1 with
weight 0.2, constant for 149 epochs of 5004 steps, then falling tenfold in 1000 epochs (in 800 after 99 at 512 pixels);
since July 2026 ``cosine_over_tokens`` with weight 0.5. DiT: weight 0.04.

Differs from the reference (github.com/vvvvvjdy/SRA): the projector belongs to this term, not to the network; a chain of
discrete levels reaches its lowest one, where the reference stops one above; in evaluation the student is projected too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untwine.contracts import Output
from untwine.training.objectives.base import PathDraw, Role, Term, width_at

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
        self.projector = nn.Identity() if width is None else _projector(width, width)

    def networks(self) -> dict[str, Role]:
        return {"teacher": Role(trainable=False, source=f"ema:{self.ema}")}

    def bind(self, model: nn.Module) -> None:
        if isinstance(self.projector, nn.Identity):
            self.projector = _projector(width_at(model, self.sites[0]), width_at(model, self.teacher_site))

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
        t = draw.path.snap((draw.t - self.gap * draw.uniform("sra")).clamp(min=0))
        x_t = draw.path.interpolate(draw.x0, draw.noise, t)
        return teacher(x_t, t, draw.condition, features=(self.teacher_site,)).features[self.teacher_site]


def distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Elementwise (B, N, D) between tokens of that shape; a cosine leaves (B, N), or (B, D) over tokens."""
    if kind in ("cosine", "cosine_over_tokens"):
        return 1 - F.cosine_similarity(a, b, dim=-1 if kind == "cosine" else 1)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(a, b, beta=0.05, reduction="none")
    return (a - b).abs() if kind == "l1" else (a - b).square()


def _projector(width: int, out: int) -> nn.Sequential:
    """``Linear(D, 2 D), SiLU, Linear(2 D, out)``, Xavier-uniform with zero biases."""
    found = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, out))
    for layer in (found[0], found[2]):
        nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return found
