"""Guidance as a weighted sum of network branches; a branch of weight 0 is not run.

Classifier-free guidance is ``{cond: w, null: 1 - w}``; an interval, a ramp, a negative prompt, autoguidance and several
conditions are other weight tables over other branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from untwine.contracts import Condition, EncoderState, Output, Prediction, StepInfo, cat
from untwine.diffusion.paths import Path

Weights = Callable[[StepInfo, float], Mapping[str, float]]
"""(where, t) -> weight of each branch; a pure function"""


@dataclass(frozen=True)
class Interval:
    """Times at which guidance acts, in untwine's direction: (0, 0.7) is what DDT writes as (0.3, 1).

    Both ends are open unless ``closed``. The test is made in float32 from the noise end, where grids are built.
    """

    low: float = 0.0
    high: float = 1.0
    closed: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high <= 1):
            raise ValueError(f"guidance_interval must be increasing within [0, 1], got ({self.low}, {self.high})")

    def __contains__(self, t: float) -> bool:
        start, now, end = (np.float32(1 - v) for v in (self.high, t, self.low))
        return bool(start <= now <= end) if self.closed else bool(start < now < end)


def classifier_free(scale: float, interval: Interval | None = None) -> Weights:
    """Weights of branches ``cond`` and ``null`` (Ho & Salimans, arXiv 2207.12598; intervals: arXiv 2404.07724).

    Args:
        scale: ``null + scale (cond - null)``; 1 = no guidance.
        interval: where it acts; None = everywhere, both ends of the grid included.
    """
    if not math.isfinite(scale) or scale < 0:
        raise ValueError(f"guidance_scale must be a finite number >= 0 (1 = no guidance), got {scale}")

    def weights(at: StepInfo, t: float) -> Mapping[str, float]:
        if interval is not None and t not in interval:
            return {"cond": 1.0}
        return {"cond": scale, "null": 1.0 - scale}

    return weights


@dataclass(frozen=True)
class Branch:
    """One network under one condition."""

    model: Any
    condition: Condition


@dataclass
class _Shared:
    """Encoder states of one network, branches stacked along the batch in the order of ``names``."""

    names: tuple[str, ...]
    state: EncoderState


class Guided:
    """The denoiser of one generation: evaluates the branches that count in one batch and sums them.

    Holds the encoder states of decoupled backbones between refreshes, for the branches that have a weight before the
    next refresh. One object serves one generation, so nothing outlives it.

    Args:
        branches: name -> branch; branches of the same network share a call.
        weights: a pure function; see :data:`Weights`.
        modulation_budget: bytes that cached decoder modulations may take (:meth:`modulate` of the backbone); they are
            cached only for states that are used more than once. 0 turns it off.
    """

    def __init__(
        self, branches: Mapping[str, Branch], weights: Weights, *, path: Path, modulation_budget: int = 2**30
    ) -> None:
        if not branches:
            raise ValueError("branches must name at least one branch")
        self.branches = dict(branches)
        self.weights = weights
        self.path = path
        self.modulation_budget = modulation_budget
        self.num_evaluations = 0
        """samples sent through a network, counted per branch"""
        self.num_refreshes = 0
        """encoder passes, counted per branch"""
        self._shared: dict[int, _Shared] = {}
        self._conditions: dict[tuple[str, ...], Condition] = {}

    def __call__(self, x: Tensor, t: Tensor, at: StepInfo) -> Prediction:
        weights = self._active(at, float(t))
        value, kind, variance = None, None, None
        for names in self._by_model(weights):
            model = self.branches[names[0]].model
            output = self._run(model, names, x, float(t), at)
            kind = model.predicts
            if variance is None and "variance" in output.extra:
                variance = output.extra["variance"][: x.shape[0]].float()
            for name, part in zip(names, output.sample.float().split(x.shape[0])):
                value = weights[name] * part if value is None else value + weights[name] * part
        assert value is not None and kind is not None
        return Prediction(value, kind, x, t, self.path, variance)

    def _active(self, at: StepInfo, t: float) -> dict[str, float]:
        table = self.weights(at, t)
        if unknown := set(table) - set(self.branches):
            raise ValueError(f"weights name unknown branches {sorted(unknown)}; known: {sorted(self.branches)}")
        active = {name: float(table[name]) for name in self.branches if table.get(name, 0.0) != 0.0}
        if not active:
            raise ValueError(f"weights are all zero at step {at.step}; at least one branch must count")
        return active

    def _by_model(self, names: Mapping[str, float]) -> list[tuple[str, ...]]:
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(id(self.branches[name].model), []).append(name)
        return [tuple(group) for group in groups.values()]

    def _run(self, model: Any, names: tuple[str, ...], x: Tensor, t: float, at: StepInfo) -> Output:
        self.num_evaluations += len(names)
        if not getattr(model, "decoupled", False):
            return model(*self._inputs(names, x, t))
        if at.refresh:
            self._refresh(model, names, x, t, at)
        shared = self._shared[id(model)]
        first = shared.names.index(names[0])
        if shared.names[first : first + len(names)] != names:
            raise ValueError(f"branches {names} of one network must be neighbours in {shared.names}")
        state = shared.state
        if names != shared.names:
            size = x.shape[0]
            state = state.select(slice(first * size, (first + len(names)) * size))
        return model.decode(torch.cat([x] * len(names)), state)

    def _refresh(self, model: Any, names: tuple[str, ...], x: Tensor, t: float, at: StepInfo) -> None:
        served = [replace(at, step=s, stage=g) for s, g, _ in at.ahead]
        needed = set(names).union(*(self._active(info, time) for info, (_, _, time) in zip(served, at.ahead)))
        names = tuple(n for n, b in self.branches.items() if n in needed and b.model is model)
        state = model.encode(*self._inputs(names, x, t))
        if len(at.ahead) > 1 and model.modulation_bytes(state) <= self.modulation_budget:
            state = model.modulate(state)
        self.num_refreshes += len(names)
        self._shared[id(model)] = _Shared(names, state)

    def _inputs(self, names: tuple[str, ...], x: Tensor, t: float) -> tuple[Tensor, Tensor, Condition]:
        if names not in self._conditions:
            self._conditions[names] = cat([self.branches[n].condition for n in names])
        rows = x.shape[0] * len(names)
        times = torch.full((rows,), t, dtype=torch.float32, device=x.device)
        return torch.cat([x] * len(names)), times, self._conditions[names]
