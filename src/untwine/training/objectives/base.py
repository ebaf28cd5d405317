"""What the trainer needs from an objective, and what an objective needs from its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from untwine.codecs.rae_features import FeatureMaps
from untwine.contracts import Batch, Condition, Draw, Loss, Output, Prediction
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import LinearPath, Path


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


@dataclass(frozen=True)
class PathDraw(Draw):
    """A draw that knows its path and what its target is."""

    path: Path = LinearPath()  # noqa: RUF009 - a frozen value
    kind: str = "velocity"
    """what ``target`` and the output's sample are: velocity, noise or x0"""
    condition: Condition = Condition()  # noqa: RUF009 - a frozen value
    """what the model is given, with the dropped labels"""
    draws: Draws | None = None
    index: Tensor | None = None
    """(B,) sample counters"""

    def uniform(self, name: str) -> Tensor:
        """(B,) draws of a term's own in [0, 1)."""
        assert self.draws is not None and self.index is not None
        return self.draws.uniform(name, (), self.index, device=self.x_t.device)

    def prediction(self, sample: Tensor) -> Prediction:
        """An output's sample with its meaning."""
        return Prediction(sample, self.kind, self.x_t, self.t, self.path)  # type: ignore[arg-type]


def parts_of(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The parts of a sample: ``image``, and ``token`` where the model diffuses a class token with it."""
    unpack = getattr(model, "unpack", None)
    return {"image": x} if unpack is None else unpack(x)


def squared_error(sample: Tensor, draw: Draw, model: Any, part: str = "image") -> Tensor:
    """(B,) mean squared error of one part of a sample, in float32."""
    return parts_of(model, (sample.float() - draw.target).square())[part].flatten(1).mean(1)


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

    def encoders(self) -> tuple[FeatureMaps, ...]:
        """Frozen encoders whose features of the clean pictures are wanted in ``batch.features``."""
        return ()

    def bind(self, model: nn.Module) -> None:
        """Builds what depends on the model, such as the widths of projectors; called once, before training."""

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        """The loss of one micro-batch for the update of one network; a mean over the micro-batch."""
        raise NotImplementedError


class Term(nn.Module):
    """One summand of an objective. ``scale`` multiplies it in the total; the log shows it unscaled."""

    kinds: ClassVar[str] = "untwine.training.objectives:TERMS"
    scale: float = 1.0
    sites: tuple[str, ...] = ()
    """features of the model that the term reads"""

    def networks(self) -> dict[str, Role]:
        """Networks besides ``model``, by name; terms may share one."""
        return {}

    def encoders(self) -> tuple[FeatureMaps, ...]:
        """As :meth:`Objective.encoders`."""
        return ()

    def bind(self, model: nn.Module) -> None:
        """As :meth:`Objective.bind`."""

    def scale_at(self, step: int) -> float:
        """The scale at an optimizer step."""
        return self.scale

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        """name -> (B,) per sample or a scalar."""
        raise NotImplementedError


def width_at(model: nn.Module, site: str) -> int:
    """Width D of the tokens at a site of ``model``.

    Raises:
        ValueError: for a place that is no block.
    """
    try:
        return int(model.get_submodule(site.partition(":")[0]).hidden_size)  # type: ignore[arg-type]
    except AttributeError as error:
        raise ValueError(f"site: {type(model).__name__} has no block {site!r}; name one as blocks.i") from error


def projector_of(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with SiLU between, Xavier-uniform with zero biases."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layer = nn.Linear(before, after)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.SiLU()]
    return nn.Sequential(*layers[:-1])
