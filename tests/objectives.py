"""Objectives that prove the contract of the trainer: a term with parameters, and a second network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from untwine.contracts import Batch, Draw, Loss, Output
from untwine.diffusion.draws import Draws
from untwine.training.objectives import OBJECTIVES, TERMS
from untwine.training.objectives.base import Role, Term
from untwine.training.objectives.flow_matching import FlowMatching
from untwine.training.optim import AdamW


class ProjectorTerm(Term):
    """Aligns a projection of one block's tokens with the pooled clean sample; the projector is trained as well."""

    def __init__(self, *, site: str = "blocks.1", width: int = 32, channels: int = 1, scale: float = 0.5) -> None:
        super().__init__()
        self.sites, self.scale = (site,), scale
        self.projector = nn.Linear(width, channels)

    def forward(self, draw: Draw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        projected = self.projector(output.features[self.sites[0]].float().mean(1))
        return {"alignment": (projected - draw.x0.mean((2, 3))).square().mean(1)}


class Critic(nn.Module):
    """Scores a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TwoNetworks(FlowMatching):
    """A critic learns to tell data from one-step samples, twice as often as the model learns to fool it."""

    def __init__(self, *, pixels: int = 64, teacher: bool = False) -> None:
        super().__init__(label_dropout=0.0)
        self.pixels, self.teacher = pixels, teacher

    def networks(self) -> dict[str, Role]:
        def critic() -> nn.Module:
            made = Critic()
            made(torch.zeros(1, self.pixels))
            return made

        roles = {"critic": Role(critic, optimizer=AdamW(lr=3e-3, betas=(0.5, 0.9)))}
        if self.teacher:
            roles["teacher"] = Role(trainable=False, source="ema:0")
        return roles

    def updates(self, step: int) -> tuple[str, ...]:
        return ("critic", "model") if step % 2 else ("critic",)

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        draw = self.draw(networks["model"], batch, draws)
        velocity = networks["model"](draw.x_t, draw.t, batch.condition).sample.float()
        guess = self.path.velocity_to_x0(velocity, draw.x_t, draw.t)
        if update == "critic":
            real, fake = networks["critic"](batch.x0), networks["critic"](guess.detach())
            total = (nn.functional.softplus(-real) + nn.functional.softplus(fake)).mean()
            return Loss(total, {"critic": total.detach()})
        flow = (velocity - draw.target).square().flatten(1).mean(1)
        total = flow.mean() + 0.1 * nn.functional.softplus(-networks["critic"](guess)).mean()
        if self.teacher:
            with torch.no_grad():
                target = networks["teacher"](draw.x_t, draw.t, batch.condition).sample
            total = total + 0.1 * (velocity - target).square().mean()
        return Loss(total, {"flow": flow.mean().detach()}, flow.detach(), draw.t)


def register() -> None:
    """Adds them to the registries, once."""
    if "test_projector" not in TERMS:
        TERMS.register("test_projector", "tests.objectives:ProjectorTerm")
        OBJECTIVES.register("test_two_networks", "tests.objectives:TwoNetworks")
