"""What to use where nothing is computed: plain reuse, forecasts, corrected reuse.

Predictors are pure: a history is a value, ``update`` returns the next one, ``predict`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from untwine.acceleration.caching.correction import Affinity


class When(NamedTuple):
    """The evaluation at which something is computed or predicted."""

    step: int
    stage: int = 0
    t: float | None = None


class History(NamedTuple):
    """What is kept of the computed values of one site, one guidance branch and one evaluation of the step."""

    factors: tuple[Tensor, ...]
    """of rising order: the newest value, then its differences"""
    at: tuple[When, ...]
    """when the values behind the factors were computed, newest first"""
    dtype: torch.dtype
    """of the values"""

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(factor.nbytes for factor in self.factors)


class Predictor:
    """Plain values in, plain values out; the fields of a predictor are its options."""

    kinds: ClassVar[str] = "untwine.acceleration.caching:PREDICTORS"

    def update(self, history: History | None, value: Tensor, at: When, *, differences: bool = True) -> History:
        """The history after ``value`` was computed; without ``differences`` it starts anew."""
        raise NotImplementedError

    def predict(self, history: History, at: When, site: str = "") -> Tensor:
        """The value of ``site`` at another evaluation, in the dtype of the computed ones."""
        raise NotImplementedError


@dataclass(frozen=True)
class Reuse(Predictor):
    """The last computed value."""

    def update(self, history, value, at, *, differences=True):
        return History((value,), (at,), value.dtype)

    def predict(self, history, at, site=""):
        return history.factors[0]


@dataclass(frozen=True)
class Taylor(Predictor):
    """TaylorSeer's forecast ``sum_i f_i x^i / i!``, x the steps since the last computed one (arXiv 2503.06923).

    ``f_0`` is the newest value, ``f_{i+1} = (f_i - f_i before) / d`` with d the newest interval alone, as published: of
    values that are no line in the step it forms backward differences, not derivatives. Order 0 is plain reuse.
    """

    order: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the factors: the powers of x amplify their rounding"""

    def __post_init__(self) -> None:
        if self.order not in range(5):
            raise ValueError(f"order must be 0, 1, 2, 3 or 4, got {self.order!r}")

    def update(self, history, value, at, *, differences=True):
        kept, times = (history.factors, history.at) if history is not None and differences else ((), ())
        factors = [value.float()]
        for i, before in enumerate(kept[: self.order]):
            factors.append((factors[i] - before.float()) / self._interval(times, i, at))
        stored = tuple(factor.to(getattr(torch, self.dtype)) for factor in factors)
        return History(stored, (at, *times)[: len(stored)], value.dtype)

    def predict(self, history, at, site=""):
        value = history.factors[0].float()
        for weight, factor in zip(self._weights(history.at, at)[1:], history.factors[1:]):
            value = torch.add(value, factor.float(), alpha=weight)
        return value.to(history.dtype)

    def _interval(self, before: tuple[When, ...], i: int, at: When) -> float:
        """What the difference of order i + 1 is divided by."""
        return at.step - before[0].step

    def _weights(self, known: tuple[When, ...], at: When) -> list[float]:
        """What the factor of each order is multiplied by; that of order 0 is 1."""
        x = at.step - known[0].step
        return list(accumulate(range(1, len(known)), lambda weight, i: weight * x / i, initial=1.0))


@dataclass(frozen=True)
class Newton(Taylor):
    """The polynomial through the last ``order + 1`` computed values, exact for unequal intervals.

    Newton's form: ``f_{i+1}`` is the divided difference over the newest i + 2 values, its weight the product of
    ``x - x_k`` over the newest i + 1. In exact arithmetic a weighted sum of the values, with weights that sum to 1.
    """

    coordinate: Literal["step", "t"] = "step"
    """the variable of the polynomial: the step number, or the time of the evaluation"""

    def _interval(self, before, i, at):
        return self._coordinate(at) - self._coordinate(before[i])

    def _weights(self, known, at):
        x = self._coordinate(at)
        nodes = [x - self._coordinate(when) for when in known[:-1]]
        return [prod(nodes[:i]) for i in range(len(known))]

    def _coordinate(self, when: When) -> float:
        if self.coordinate == "step":
            return when.step
        if when.t is None:
            raise ValueError("coordinate='t' needs a sampling driver that tells the times; use coordinate='step'")
        return when.t


@dataclass(frozen=True)
class Affine(Predictor):
    """CacheQuant's corrected reuse, ``a F + b`` per channel with tables from calibration (arXiv 2503.01323)."""

    tables: Mapping[tuple[str, int], Affinity] = field(default_factory=dict)
    """(site, stage of the solver) -> table, from :func:`~untwine.acceleration.caching.calibration.calibrate`"""

    update = Reuse.update

    def predict(self, history, at, site=""):
        table = self.tables.get((site, at.stage))
        if table is None or at.step >= len(table.a):
            known = sorted(self.tables)
            raise ValueError(f"tables have no entry for {site}, stage {at.stage}, step {at.step} (known: {known})")
        return table.apply(history.factors[0], at.step)
