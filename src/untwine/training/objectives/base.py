"""What the trainer needs from an objective, and what an objective needs from its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from untwine.contracts import Batch, Draw, Loss, Output
from untwine.diffusion.draws import Draws


@dataclass(frozen=True)
class Role:
    """A network besides the model that an objective trains or consults."""

    init: Callable[[], nn.Module] | None = None
    """builds it; None = another instance of the recipe's model, with the same initial weights"""
    trainable: bool = True
    optimizer: Any | None = None
    """an OptimizerConfig; None = the recipe's"""
    source: str | None = None
    """``ema:k``: its weights follow that EMA profile of the model (a teacher)"""

    def __post_init__(self) -> None:
        if self.source is not None and (self.trainable or not self.source.startswith("ema:")):
            raise ValueError(f"source must be 'ema:k' on a role with trainable=False, got {self.source!r}")


class Objective(nn.Module):
    """What is minimised. Its own parameters are optimised with the model, saved under ``objective.``, not exported.

    The trainer alone calls backward, clips and steps.
    """

    kinds: ClassVar[str] = "untwine.training.objectives:OBJECTIVES"

    def networks(self) -> dict[str, Role]:
        """Networks besides ``model``, by name."""
        return {}

    def updates(self, step: int) -> tuple[str, ...]:
        """Names of the networks updated in this step, in order."""
        return ("model",)

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        """The loss of one micro-batch for the update of one network; a mean over the micro-batch."""
        raise NotImplementedError


class Term(nn.Module):
    """One summand of an objective. ``scale`` multiplies it in the total; the log shows it unscaled."""

    kinds: ClassVar[str] = "untwine.training.objectives:TERMS"
    scale: float = 1.0
    sites: tuple[str, ...] = ()
    """features of the model that the term reads"""

    def forward(self, draw: Draw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        """name -> (B,) per sample or a scalar."""
        raise NotImplementedError
