"""An objective that goes wrong at one sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from untwine.contracts import Batch, Loss
from untwine.diffusion.draws import Draws
from untwine.training.objectives import OBJECTIVES
from untwine.training.objectives.flow_matching import FlowMatching


class Poisoned(FlowMatching):
    """Flow matching whose loss, or only its gradient, is not a number in the micro-batch with sample ``counter``."""

    def __init__(self, *, counter: int, where: Literal["loss", "gradient"] = "loss") -> None:
        super().__init__()
        self.counter, self.where = counter, where

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        loss = super().forward(networks, batch, update=update, step=step, draws=draws)
        hit = batch.index == self.counter
        if not self.training or not hit.any() or loss.per_sample is None:
            return loss
        if self.where == "gradient":
            zero = next(networks["model"].parameters()).sum() * 0
            return replace(loss, total=loss.total + zero.sqrt())  # 0, with a slope of infinity times 0
        per_sample = torch.where(hit, float("nan"), loss.per_sample)
        return replace(loss, total=loss.total + per_sample.mean(), per_sample=per_sample)


def register() -> None:
    """Adds it to the registry, once."""
    if "test_poisoned" not in OBJECTIVES:
        OBJECTIVES.register("test_poisoned", "tests.faults.poison:Poisoned")
