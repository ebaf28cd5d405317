"""When to compute: the schedules of a cache, and the dynamic programme that finds the cheapest one.

Steps are counted from 0 in the order of execution. A schedule is a set of *computed* steps that starts at 0; every
other step uses what the computed ones before it left behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor


def segment_costs(error: Tensor) -> Tensor:
    """``E[j, i] = sum_{l=j}^{i-1} error[j, l]``: what it costs to compute at j and to reuse that through i - 1.

    Args:
        error: (N, N) float64, ``error[j, l]`` = harm done at step l by what was computed at step j <= l.

    Returns:
        (N, N + 1) float64; 0 for i <= j.
    """
    if error.ndim != 2 or error.shape[0] != error.shape[1]:
        raise ValueError(f"error must be (N, N), one row and one column a step, got {tuple(error.shape)}")
    summed = error.double().triu().cumsum(1)
    return torch.cat([torch.zeros_like(summed[:, :1]), summed], 1)


def dynamic_programming(
    costs: Tensor, budget: int, *, min_length: int = 1, max_length: int | None = None
) -> tuple[tuple[int, ...], float]:
    """The cheapest ``budget`` computed steps, the first of them 0, and their cost.

    ``C[k, i] = min_j C[k - 1, j] + costs[j, i]`` over segments [j, i) of allowed length; of equal ones the lowest j
    (DDT's encoder sharing, arXiv 2504.05741; with bounded lengths CacheQuant, arXiv 2503.01323).

    Args:
        costs: (N, N + 1) from :func:`segment_costs`.
        budget: number of computed steps, in [1, N].
        min_length, max_length: steps that one computation serves, itself included; None = no upper bound.

    Raises:
        ValueError: for a budget outside [1, N], or when no schedule of that budget has segments of allowed lengths.
    """
    num_steps = len(costs)
    if costs.shape != (num_steps, num_steps + 1):
        raise ValueError(f"costs must be (N, N + 1), as segment_costs returns them, got {tuple(costs.shape)}")
    check_budget(budget, num_steps)
    max_length = num_steps if max_length is None else max_length
    if not 1 <= min_length <= max_length or not budget * min_length <= num_steps <= budget * max_length:
        raise ValueError(
            f"budget {budget} cannot cover {num_steps} steps with segments of {min_length} to {max_length} steps; "
            f"{num_steps} steps need min_length <= {num_steps // budget} and max_length >= {-(-num_steps // budget)}"
        )
    length = np.arange(num_steps + 1) - np.arange(num_steps)[:, None]
    allowed = (length >= min_length) & (length <= max_length)
    segments = np.where(allowed, costs.double().cpu().numpy(), np.inf)
    total = np.full(num_steps + 1, np.inf)
    total[0] = 0.0
    parents = []
    for _ in range(budget):
        candidates = total[:-1, None] + segments
        parents.append(candidates.argmin(0))  # the first of equal ones
        total = candidates.min(0)
    if not np.isfinite(total[-1]):
        raise ValueError("costs are infinite or NaN on every schedule of this budget; measure them over a wider window")
    path = [num_steps]
    for parent in reversed(parents):
        path.append(int(parent[path[-1]]))
    return tuple(path[:0:-1]), float(total[-1])


def check_budget(budget: int, num_steps: int) -> None:
    """Raises ValueError unless ``budget`` is within [1, num_steps]."""
    if isinstance(budget, bool) or not 1 <= budget <= num_steps:
        raise ValueError(f"budget must be within [1, num_steps = {num_steps}] computed steps, got {budget}")


def uniform(num_steps: int, every: int) -> tuple[int, ...]:
    """Every so many steps, from 0."""
    if isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    return tuple(range(0, num_steps, every))


def uniform_budget(num_steps: int, budget: int) -> tuple[int, ...]:
    """``budget`` computed steps spread evenly, the first of them 0."""
    check_budget(budget, num_steps)
    return tuple(k * num_steps // budget for k in range(budget))


class Schedule:
    """When to compute; the fields of a schedule are its options."""

    kinds: ClassVar[str] = "untwine.acceleration.caching:SCHEDULES"

    @property
    def differences_from(self) -> int:
        """First step at which a forecast may form differences."""
        return 0

    def steps(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a generation of ``num_steps`` steps, rising from 0.

        Raises:
            ValueError: when the schedule does not fit that number of steps.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class All(Schedule):
    """Every step is computed."""

    def steps(self, num_steps: int) -> tuple[int, ...]:
        return uniform(num_steps, 1)


@dataclass(frozen=True)
class Uniform(Schedule):
    """Every so many steps."""

    every: int = 2

    def __post_init__(self) -> None:
        uniform(1, self.every)

    def steps(self, num_steps: int) -> tuple[int, ...]:
        return uniform(num_steps, self.every)


@dataclass(frozen=True)
class Explicit(Schedule):
    """Just the steps named."""

    at: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.at or self.at[0] != 0 or any(a >= b for a, b in pairwise(self.at)):
            raise ValueError(f"at must be rising steps that start at 0, got {self.at}")

    def steps(self, num_steps: int) -> tuple[int, ...]:
        if self.at[-1] >= num_steps:
            raise ValueError(f"at names step {self.at[-1]}, but there are {num_steps} steps, 0 to {num_steps - 1}")
        return self.at


@dataclass(frozen=True)
class WarmUp(Schedule):
    """The first ``warmup`` steps, then every ``interval`` steps counted from the last of them (arXiv 2503.06923).

    Published: DiT 2 and 4; FLUX 3 and 6; HunyuanVideo and Wan 1 and 5; HiDream 1 and 4. Differences are formed from
    the last step of the warm-up on, so that with a warm-up of 3 the first one is of steps 1 and 2.
    """

    interval: int = 4
    warmup: int = 2

    def __post_init__(self) -> None:
        uniform(1, self.interval)
        if self.warmup < 1:
            raise ValueError(f"warmup must be at least 1 step, got {self.warmup}")

    @property
    def differences_from(self) -> int:
        return self.warmup - 1

    def steps(self, num_steps: int) -> tuple[int, ...]:
        warm = range(min(self.warmup, num_steps))
        return (*warm, *range(self.warmup - 1 + self.interval, num_steps, self.interval))


@dataclass(frozen=True)
class DynamicProgramming(Schedule):
    """The cheapest ``budget`` steps under a measured error, see :func:`dynamic_programming`."""

    budget: int
    error: tuple[tuple[float, ...], ...]
    """(N, N), as :func:`~untwine.acceleration.caching.calibration.measure` returns it; a tensor is taken too"""
    min_length: int = 1
    max_length: int | None = None

    def __post_init__(self) -> None:
        _freeze(self)

    def steps(self, num_steps: int) -> tuple[int, ...]:
        costs = _costs(self.error, num_steps)
        return dynamic_programming(costs, self.budget, min_length=self.min_length, max_length=self.max_length)[0]


@dataclass(frozen=True)
class CacheQuant(Schedule):
    """Groups of about ``interval`` steps, the cheapest under a measured error (arXiv 2503.01323).

    ``ceil(N / interval)`` groups of ``ceil(interval / 2)`` to ``2 interval`` steps. The published error is the L1
    distance, entries summed.
    """

    interval: int
    error: tuple[tuple[float, ...], ...]
    """as in :class:`DynamicProgramming`"""
    bounded: bool = True
    """False: groups of any length"""

    def __post_init__(self) -> None:
        uniform(1, self.interval)
        _freeze(self)

    def steps(self, num_steps: int) -> tuple[int, ...]:
        costs, budget = _costs(self.error, num_steps), -(-num_steps // self.interval)
        if not self.bounded:
            return dynamic_programming(costs, budget)[0]
        shortest, longest = -(-self.interval // 2), 2 * self.interval
        return dynamic_programming(costs, budget, min_length=shortest, max_length=longest)[0]


class Gate(NamedTuple):
    """What an error-gated schedule remembers of the steps since the last computed one."""

    accumulated: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class ErrorGated(Schedule):
    """Decides while sampling: computes once the relative changes of an indicator have added up to a threshold.

    ``sum |y_s - y_{s-1}|_1 / |y_{s-1}|_1`` over the steps since the last computed one, y the output of the indicator
    for the first guidance branch (the rule of TeaCache, arXiv 2411.19108, without its fitted polynomial).
    The indicator and everything inside it run at every step.
    """

    threshold: float = 0.1
    indicator: str = "blocks.0"
    """a site that runs before the cached ones"""
    max_skips: int = 4
    """most steps in a row that are not computed"""
    first: int = 1
    last: int = 1
    """steps at either end that are computed anyway"""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be >= 0 (0 = every step), got {self.threshold}")
        if self.max_skips < 0 or self.first < 1 or self.last < 0:
            raise ValueError(
                f"max_skips and last must be >= 0 and first >= 1, got {self.max_skips}, {self.last} and {self.first}"
            )

    def decide(self, gate: Gate, change: float, step: int, num_steps: int) -> tuple[bool, Gate]:
        """Whether to compute ``step``, and what to remember after it."""
        accumulated = gate.accumulated + change
        at_end = step < self.first or step >= num_steps - self.last
        if at_end or accumulated >= self.threshold or gate.skipped >= self.max_skips:
            return True, Gate()
        return False, Gate(accumulated, gate.skipped + 1)


def _freeze(schedule: DynamicProgramming | CacheQuant) -> None:
    rows = torch.as_tensor(schedule.error, dtype=torch.float64)
    segment_costs(rows)
    object.__setattr__(schedule, "error", tuple(map(tuple, rows.tolist())))


def _costs(error: tuple[tuple[float, ...], ...], num_steps: int) -> Tensor:
    if len(error) != num_steps:
        raise ValueError(f"error was measured over {len(error)} steps and this run has {num_steps}; measure it again")
    return segment_costs(torch.tensor(error, dtype=torch.float64))
