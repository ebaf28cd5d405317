"""Guidance as a weighted sum of network branches; a branch of weight 0 is not run.

Classifier-free guidance is ``{cond: w, null: 1 - w}``; an interval, a ramp, a negative prompt, autoguidance and several
conditions are other weight tables over other branches. ``cond:base`` is the weight of the second prediction of branch
``cond``, its output's ``extra["base"]``: internal guidance costs no further call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from untwine.contracts import Condition, EncoderState, Output, Prediction, StepInfo, cat
from untwine.diffusion.forecast import Forecast
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


def internal_guidance(weights: Weights, scales: Mapping[str, float], interval: Interval | None = None) -> Weights:
    """``weights`` with each branch replaced by ``base + scale (branch - base)`` (DiffusionBench, arXiv 2606.24888).

    Args:
        scales: branch -> scale; branches that are not named stay as they are.
        interval: where it acts; None = everywhere.
    """
    if wrong := {name: scale for name, scale in scales.items() if not (math.isfinite(scale) and scale >= 0)}:
        raise ValueError(f"internal_scale must be finite and >= 0 (1 = no guidance), got {wrong}")

    def guided(at: StepInfo, t: float) -> Mapping[str, float]:
        table = weights(at, t)
        if interval is not None and t not in interval:
            return table
        found = {name: weight * scales.get(name, 1.0) for name, weight in table.items()}
        return found | {f"{n}:base": weight * (1 - scales[n]) for n, weight in table.items() if n in scales}

    return guided


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
    forecast: Forecast | None = None
    """of what ``extrapolated`` names in the state"""
    extrapolated: str = "modulations"


class Guided:
    """The denoiser of one generation: evaluates the branches that count in one batch and sums them.

    Holds the encoder states of decoupled backbones between refreshes, for the branches that have a weight before the
    next refresh. One object serves one generation, so nothing outlives it.

    What the decoder is given on a reused step is the state of the last refresh, or with ``order`` >= 1 a forecast from
    the last ``order + 1``. Modulations are what is extrapolated, and beyond the budget the state's tokens, which for
    modulations that are affine in the tokens is the same. (A backbone with a nonlinear map in between returns that
    map's result as its tokens.)

    Args:
        branches: name -> branch; branches of the same network share a call.
        weights: a pure function; see :data:`Weights`.
        modulation_budget: bytes that cached decoder modulations may take (:meth:`modulate` of the backbone); they are
            cached only for states that are used more than once. 0 turns it off.
        order: degree of the polynomial in time that forecasts, 0-3; 0 = reuse as it is.
        retime: mix the current time into the reused state (with ``order`` >= 1: into the extrapolated ``hidden``).
        coordinate: the variable of that polynomial as a function of t, strictly monotonic.
        end: of a network of two times, the time ``r`` at which a step ends; None = the one at which it starts, for
            which the network predicts the instantaneous velocity.
        channels: how many of the first channels are guided, the others being the first branch's; None = all.
    """

    def __init__(
        self,
        branches: Mapping[str, Branch],
        weights: Weights,
        *,
        path: Path,
        modulation_budget: int = 2**30,
        order: int = 0,
        retime: bool = False,
        coordinate: Callable[[float], float] = float,
        end: Callable[[StepInfo], float] | None = None,
        channels: int | None = None,
    ) -> None:
        if not branches:
            raise ValueError("branches must name at least one branch")
        check_order(order)
        self.branches = dict(branches)
        self.weights = weights
        self.path = path
        self.modulation_budget = modulation_budget
        self.order, self.retime, self.coordinate, self.end, self.channels = order, retime, coordinate, end, channels
        self.num_evaluations = 0
        """samples sent through a network, counted per branch"""
        self.num_refreshes = 0
        """encoder passes, counted per branch"""
        self.num_modulations = 0
        """times that the decoder's modulations were computed from a state, counted per branch"""
        self.cache_bytes = 0
        """the most that states, modulations and histories took between two calls"""
        self._shared: dict[int, _Shared] = {}
        self._conditions: dict[tuple[str, ...], Condition] = {}

    def __call__(self, x: Tensor, t: Tensor, at: StepInfo) -> Prediction:
        weights = self._active(at, float(t))
        value, first, kind, variance = None, None, None, None
        for names in self._by_model(weights):
            model = self.branches[names[0]].model
            output = self._run(model, names, x, float(t), at)
            kind = model.predicts
            if variance is None and "variance" in output.extra:
                variance = output.extra["variance"][: x.shape[0]].float()
            parts = zip(output.sample.split(x.shape[0]), _bases(output, names, weights).split(x.shape[0]))
            for name, (full, base) in zip(names, parts):
                first = full.float() if first is None else first
                for weight, part in zip(weights[name], (full, base)):
                    if weight:
                        value = weight * part.float() if value is None else value + weight * part.float()
        assert value is not None and first is not None and kind is not None
        if self.channels is not None:
            value = torch.cat((value[:, : self.channels], first[:, self.channels :]), 1)
        return Prediction(value, kind, x, t, self.path, variance)

    def _active(self, at: StepInfo, t: float) -> dict[str, tuple[float, float]]:
        """Branches that count -> the weights of their prediction and of their base's."""
        table = self.weights(at, t)
        if unknown := {name.removesuffix(":base") for name in table} - set(self.branches):
            raise ValueError(f"weights name unknown branches {sorted(unknown)}; known: {sorted(self.branches)}")
        pairs = {n: (float(table.get(n, 0.0)), float(table.get(f"{n}:base", 0.0))) for n in self.branches}
        active = {name: pair for name, pair in pairs.items() if any(pair)}
        if not active:
            raise ValueError(f"weights are all zero at step {at.step}; at least one branch must count")
        return active

    def _by_model(self, names: Collection[str]) -> list[tuple[str, ...]]:
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(id(self.branches[name].model), []).append(name)
        return [tuple(group) for group in groups.values()]

    def _run(self, model: Any, names: tuple[str, ...], x: Tensor, t: float, at: StepInfo) -> Output:
        self.num_evaluations += len(names)
        if not getattr(model, "decoupled", False):
            _announce(model, at, names)
            return model(*self._inputs(names, x, t, at))
        if at.refresh:
            self._refresh(model, names, x, t, at)
        state = self._state(self._shared[id(model)], names, x.shape[0], t, at)
        if self.retime and not at.refresh:
            given = {"retime": torch.full((len(names) * x.shape[0],), t, dtype=torch.float32, device=x.device)}
        else:
            given = {}
        self.num_modulations += len(names) * (state.modulations is None)
        _announce(model, at, names)
        return model.decode(torch.cat([x] * len(names)), state, **given)

    def _state(self, shared: _Shared, names: tuple[str, ...], size: int, t: float, at: StepInfo) -> EncoderState:
        """What the decoder of the branches ``names`` is given."""
        first = shared.names.index(names[0])
        if shared.names[first : first + len(names)] != names:
            raise ValueError(f"branches {names} of one network must be neighbours in {shared.names}")
        state = shared.state
        if names != shared.names:
            state = state.select(slice(first * size, (first + len(names)) * size))
        if shared.forecast is None or at.refresh:
            return state
        found = tuple(v.to(state.tokens.dtype) for v in shared.forecast.at(names, self.coordinate(t)))
        return replace(state, **{shared.extrapolated: found if shared.extrapolated == "modulations" else found[0]})

    def _refresh(self, model: Any, names: tuple[str, ...], x: Tensor, t: float, at: StepInfo) -> None:
        served = [replace(at, step=s, stage=g) for s, g, _ in at.ahead]
        needed = set(names).union(*(self._active(info, time) for info, (_, _, time) in zip(served, at.ahead)))
        names = tuple(n for n, b in self.branches.items() if n in needed and b.model is model)
        _announce(model, at, names)
        state = model.encode(*self._inputs(names, x, t, at))
        self.num_refreshes += len(names)
        kept = self._kept(model, names, state, is_reused=len(at.ahead) > 1)
        if kept == "modulations":
            state = model.modulate(state)
            self.num_modulations += len(names)
        shared = _Shared(names, state)
        if self.order:
            before = self._shared.get(id(model))
            forecast = before.forecast if before is not None and before.forecast is not None else Forecast(self.order)
            values = getattr(state, kept)
            forecast.add(names, self.coordinate(t), values if kept == "modulations" else (values,))
            shared.forecast, shared.extrapolated = forecast, kept
        self._shared[id(model)] = shared
        self.cache_bytes = max(self.cache_bytes, sum(_nbytes(s) for s in self._shared.values()))

    def _kept(self, model: Any, names: tuple[str, ...], state: EncoderState, *, is_reused: bool) -> str:
        """The part of a state that the steps after it are given: ``modulations`` where they are worth their memory."""
        if self.retime:
            return "hidden"
        if not (self.order or is_reused):
            return "tokens"
        needed = model.modulation_bytes(state)
        if self.order:  # one answer for the whole generation: as if all branches were there
            branches = sum(branch.model is model for branch in self.branches.values())
            needed *= branches / len(names) * (1 + (self.order + 2) * 4 / state.tokens.element_size())
        return "modulations" if needed <= self.modulation_budget else "tokens"

    def _inputs(self, names: tuple[str, ...], x: Tensor, t: float, at: StepInfo) -> tuple[Tensor, Tensor, Condition]:
        if names not in self._conditions:
            self._conditions[names] = cat([self.branches[n].condition for n in names])
        rows, condition = x.shape[0] * len(names), self._conditions[names]
        times = torch.full((rows,), t, dtype=torch.float32, device=x.device)
        if "vectors.r" in getattr(self.branches[names[0]].model, "accepts", ()):
            condition = ending(condition, times if self.end is None else torch.full_like(times, self.end(at)))
        return torch.cat([x] * len(names)), times, condition


def ending(condition: Condition, r: Tensor) -> Condition:
    """``condition`` of a network of two times, whose step ends at ``r`` (B,)."""
    return replace(condition, vectors={**condition.vectors, "r": r.float()[:, None, None]})


def _bases(output: Output, names: tuple[str, ...], weights: Mapping[str, tuple[float, float]]) -> Tensor:
    """The second predictions; the first where none counts."""
    if not any(weights[name][1] for name in names):
        return output.sample
    if "base" not in output.extra:
        raise ValueError("internal_scale: this model has no second prediction; it needs one built with base_depth > 0")
    return output.extra["base"]


def check_order(order: int) -> None:
    """Raises ValueError unless ``order`` is an integer within [0, 3]."""
    if isinstance(order, bool) or order not in (0, 1, 2, 3):
        raise ValueError(f"order must be 0 (reuse), 1, 2 or 3, got {order!r}; higher orders amplify rounding")


def _announce(model: Any, at: StepInfo, names: tuple[str, ...]) -> None:
    """Tells what is attached to the model which branches the next call stacks along the batch."""
    for attachment in getattr(model, "attached", ()):
        attachment.before_step(at, names)


def _nbytes(shared: _Shared) -> int:
    state, forecast = shared.state, shared.forecast
    held = sum(x.nbytes for x in (state.tokens, state.hidden, *(state.modulations or ())))
    return held + (0 if forecast is None else forecast.nbytes)
