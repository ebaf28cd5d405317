"""Exponential moving averages of weights: lists of (sharded) float32 tensors, several at once.

A profile says how fast an average forgets; :class:`EMA` holds one average. Steps are optimizer steps, counted from 1
for the first one made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from untwine.registry import Registry
from untwine.training.distributed import reshard

PROFILES = Registry(
    "EMA profile",
    {
        "constant": "untwine.training.ema:ConstantEMA",
        "power": "untwine.training.ema:PowerEMA",
        "halflife": "untwine.training.ema:HalflifeEMA",
    },
)


class EMAProfile:
    """How much of an average survives a step."""

    kinds: ClassVar[str] = "untwine.training.ema:PROFILES"

    def decay_at(self, step: int, batch_size: int) -> float:
        """The factor in [0, 1) of the old average at ``step`` >= 1 with ``batch_size`` images a step."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ConstantEMA(EMAProfile):
    """The same decay at every step."""

    decay: float = 0.9999
    """in [0, 1)"""
    warmup: bool = False
    """at most (1 + step) / (10 + step), so that the random start is forgotten early"""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be within [0, 1), got {self.decay}")

    def decay_at(self, step: int, batch_size: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


@dataclass(frozen=True, kw_only=True)
class PowerEMA(EMAProfile):
    """The power function profile (Karras et al. 2024, arXiv 2312.02696, section 3.1): its width grows with training."""

    sigma_rel: float = 0.10
    """standard deviation of the profile relative to the length of training, in (0, 0.28)"""

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < 12**-0.5:
            raise ValueError(f"sigma_rel must be within (0, 0.288), the flat profile's width, got {self.sigma_rel}")

    @property
    def gamma(self) -> float:
        """The exponent: ``sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))``."""
        v = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - v, 12 - v]).real.max())

    def decay_at(self, step: int, batch_size: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)


@dataclass(frozen=True, kw_only=True)
class HalflifeEMA(EMAProfile):
    """Half of the average is older than ``images`` images, whatever the batch size (Karras et al. 2022)."""

    images: float = 500_000
    ramp_up: float | None = 0.05
    """the half-life is at most this fraction of the images seen; None: constant from the start"""

    def __post_init__(self) -> None:
        if self.images <= 0 or (self.ramp_up is not None and self.ramp_up <= 0):
            raise ValueError(f"images and ramp_up must be > 0 (or ramp_up None), got {self.images} and {self.ramp_up}")

    def decay_at(self, step: int, batch_size: int) -> float:
        halflife = self.images if self.ramp_up is None else min(self.images, self.ramp_up * step * batch_size)
        return 0.5 ** (batch_size / halflife)


class EMA:
    """One average of the parameters of a model.

    Args:
        named_params: the live parameters by name, as ``model.named_parameters()`` gives them after
            :func:`~untwine.training.distributed.parallelize`; the average starts from their values.
    """

    def __init__(self, profile: EMAProfile, named_params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        self.profile = profile
        # The parameters, not views of them: FSDP2 may give a parameter new memory at its first forward pass.
        self._live = dict(named_params)
        if not self._live:
            raise ValueError("named_params is empty: an average needs at least one parameter")
        if wrong := [name for name, p in self._live.items() if not p.is_floating_point()]:
            raise ValueError(f"named_params must be floating point tensors, got others: {wrong[:5]}")
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int, batch_size: int) -> None:
        """Moves the average toward the live parameters after optimizer step ``step`` >= 1 on ``batch_size`` images."""
        if step < 1 or batch_size < 1:
            raise ValueError(f"step and batch_size must be >= 1, got {step} and {batch_size}")
        live = [p.detach().to(torch.float32) for p in self._live.values()]
        weight = 1 - self.profile.decay_at(step, batch_size)
        torch._foreach_lerp_(list(self._average.values()), live, weight)  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> dict[str, Tensor]:
        """The average itself by parameter name, to be saved, or filled in place."""
        return dict(self._average)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into the parameters of ``model``, in their dtype.

        Raises:
            ValueError: where ``model`` lacks a parameter or has it in another shape.
        """
        reshard(model)
        targets = dict(model.named_parameters())
        for name, average in self._average.items():
            if name not in targets or targets[name].shape != average.shape:
                found = tuple(targets[name].shape) if name in targets else "none"
                raise ValueError(f"model must have a parameter {name} of shape {tuple(average.shape)}, found {found}")
        for name, average in self._average.items():
            targets[name].copy_(average)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, ``model`` has the averaged weights; afterwards, bit for bit, its own, whatever happened inside."""
        reshard(model)
        own = {name: p.detach().clone() for name, p in model.named_parameters() if name in self._average}
        try:
            self.copy_to(model)
            yield
        finally:
            reshard(model)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in own:
                        p.copy_(own[name])
