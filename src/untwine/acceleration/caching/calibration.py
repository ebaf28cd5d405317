"""What is measured on uncached runs: how features drift apart (for schedules), and how to correct them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from untwine.acceleration.base import Attachment, match_sites
from untwine.acceleration.caching.correction import Affinity, Sums
from untwine.contracts import StepInfo

Metric = Literal["l1", "l2", "cosine"]


def l1(now: Tensor, before: Tensor) -> Tensor:
    """Sum of absolute differences (CacheQuant)."""
    return (now - before).abs().sum()


def l2(now: Tensor, before: Tensor) -> Tensor:
    """Sum of squared differences."""
    return (now - before).square().sum()


def cosine(now: Tensor, before: Tensor) -> Tensor:
    """``1 - cos`` of each token, summed (DDT's encoder sharing)."""
    return (1 - F.cosine_similarity(now, before, dim=-1)).sum()


_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "l2": l2, "cosine": cosine}


class _Watch(Attachment):
    """Looks at what sites compute, and changes nothing."""

    def __init__(self, sites: Sequence[str]) -> None:
        self._patterns = sites

    def claim(self, model: Any) -> Iterable[str]:
        return match_sites(model, self._patterns)

    def call(
        self, site: str, at: StepInfo, forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        out = forward(*args, **kwargs)
        for name, value in zip(self.names, out.detach().chunk(len(self.names)), strict=True):
            self.see((site, name, at.stage), at, value)
        return out

    def see(self, place: tuple[str, str, int], at: StepInfo, value: Tensor) -> None:
        """Hears what one site computed for one guidance branch at one stage of the step."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        return {"sites": list(self.sites)}


class _Distances(_Watch):
    """Sums of distances between the steps of a generation; keeps the features of a window of steps."""

    def __init__(self, sites: Sequence[str], metric: Metric, window: int | None, dtype: torch.dtype) -> None:
        super().__init__(sites)
        self._metric, self._dtype = _METRICS[metric], dtype
        self._length = None if window is None else window - 1
        self._kept: dict[tuple[str, str, int], deque[tuple[int, Tensor]]] = {}
        self._sums: dict[tuple[int, int], float] = {}
        self._seen: set[tuple[str, int]] = set()
        self._num_steps = 0

    def see(self, place: tuple[str, str, int], at: StepInfo, value: Tensor) -> None:
        if at.stage:
            return
        self._num_steps = at.num_steps
        self._seen.add((place[0], at.step))
        before = self._kept.setdefault(place, deque(maxlen=self._length))
        for step, feature in before:
            distance = float(self._metric(value.float(), feature.float()))
            self._sums[step, at.step] = self._sums.get((step, at.step), 0.0) + distance
        before.append((at.step, value.to(self._dtype)))

    def reset(self) -> None:
        super().reset()
        self._kept.clear()

    def error(self) -> Tensor:
        missing = {(site, step) for site in self.sites for step in range(self._num_steps)} - self._seen
        if missing or not self._num_steps:
            raise ValueError(f"run must compute every site in every step; missing (site, step): {sorted(missing)[:3]}")
        error = torch.full((self._num_steps, self._num_steps), torch.inf, dtype=torch.float64).triu(1)
        for (before, now), total in self._sums.items():
            error[before, now] = total
        return error


class _Corrections(_Watch):
    """Sums for the line from a feature at the last computed step to that at the current one."""

    def __init__(self, sites: Sequence[str], computed: Sequence[int]) -> None:
        super().__init__(sites)
        self._computed = frozenset(computed)
        self._heads: dict[tuple[str, str, int], Tensor] = {}
        self._sums: dict[tuple[str, int], dict[int, Sums]] = {}
        self._num_steps = 0

    def see(self, place: tuple[str, str, int], at: StepInfo, value: Tensor) -> None:
        self._num_steps = at.num_steps
        if at.step in self._computed or place not in self._heads:
            self._heads[place] = value
        else:
            of_site = self._sums.setdefault((place[0], at.stage), {})
            of_site.setdefault(at.step, Sums()).add(self._heads[place], value)

    def reset(self) -> None:
        super().reset()
        self._heads.clear()

    def tables(self) -> dict[tuple[str, int], Affinity]:
        return {place: self._table(sums) for place, sums in self._sums.items()}

    def _table(self, sums: dict[int, Sums]) -> Affinity:
        """The fitted steps; the others are the identity."""
        fits = {step: found.fit() for step, found in sums.items()}
        channels = len(next(iter(fits.values()))[0])
        a, b = torch.ones(self._num_steps, channels), torch.zeros(self._num_steps, channels)
        for step, (scale, shift) in fits.items():
            a[step], b[step] = scale.cpu(), shift.cpu()
        return Affinity(a, b)


def measure(
    model: Any,
    run: Callable[[], object],
    sites: Sequence[str],
    *,
    metric: Metric = "l1",
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``error[j, l]``: how far the sites' outputs at step l are from those at step j <= l, summed over everything.

    The first evaluation of each step counts.

    Args:
        run: samples from ``model``, uncached, as :func:`untwine.diffusion.sampling.sample` does; every generation that
            it makes adds up.
        sites: patterns of sites.
        metric: ``l1``, ``l2`` (squared) or ``cosine`` (1 - cos of each token).
        window: distances are taken between steps fewer than this apart, and features kept as long; None = all.
            The other distances are infinite.
        dtype: in which features are kept.

    Returns:
        (N, N) float64, zero on and below the diagonal, for
        :class:`~untwine.acceleration.caching.schedules.DynamicProgramming`.

    Raises:
        ValueError: for an unknown metric, a window below 1, or when a site did not run in every step, as an encoder
            that is shared between steps does not.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {sorted(_METRICS)}, got {metric!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 step or None (all), got {window}")
    with _Distances(sites, metric, window, dtype).attach(model) as watch:
        run()
        return watch.error()


def calibrate(
    model: Any, run: Callable[[], object], sites: Sequence[str], computed: Sequence[int]
) -> dict[tuple[str, int], Affinity]:
    """The tables of :class:`~untwine.acceleration.caching.predictors.Affine` for a schedule of ``computed`` steps.

    Of each channel, the line from its value at the last computed step to that at the current one, least squares over
    batch, tokens and guidance branches. All features come from uncached runs, as published: on the cached trajectory
    errors accumulate that no table has seen. Only the features of the last computed step are kept.

    Args:
        run: samples from ``model``, uncached, one generation or more.
        sites: patterns of sites.
        computed: the schedule's :meth:`~untwine.acceleration.caching.schedules.Schedule.steps`.
    """
    with _Corrections(sites, computed).attach(model) as watch:
        run()
        return watch.tables()
