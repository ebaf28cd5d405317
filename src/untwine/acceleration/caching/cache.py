"""The cache of sites: computes them at the steps of a schedule and predicts them at the others.

What is kept belongs to one site, one guidance branch and one evaluation of the solver step, so that Heun's second
evaluation neither advances nor reads the history of the first, and stacked and separate branches give the same images.
A value is computed when a scheduled step has come since it last was. Hence a branch that appears later starts with a
computed value, and so does the encoder of a decoupled backbone whose refreshes miss the scheduled steps; a step that
shares the encoder state leaves the encoder's sites as they are. Where only some of the stacked branches are due, the
others still use their prediction. Another batch or token count starts a history anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from untwine.acceleration.base import Attachment, match_sites, overlap
from untwine.acceleration.caching.predictors import History, Predictor, Taylor, When
from untwine.acceleration.caching.schedules import ErrorGated, Gate, Schedule, WarmUp
from untwine.contracts import Site, StepInfo, cat

UNITS = ("sublayers", "blocks", "head")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """When to compute, where, and what to use otherwise."""

    schedule: Schedule = field(default_factory=WarmUp)
    sites: tuple[str, ...] = ("sublayers",)
    """patterns of sites (``blocks.*.attn``), or ``sublayers``: every attention and MLP, before its gate; ``blocks``:
    what each stream of blocks ends with, its blocks being left out; ``head``: the final layer, the blocks before it
    being left out"""
    predictor: Predictor = field(default_factory=Taylor)


@dataclass(frozen=True)
class _Store:
    """The history of one site, branch and stage."""

    step: int
    shape: torch.Size
    """of the site's input"""
    output: torch.Size
    history: History | None
    """None where nobody reads the value"""

    @property
    def nbytes(self) -> int:
        return 0 if self.history is None else self.history.nbytes


class Cache(Attachment):
    """``with Cache(CacheConfig(...)).attach(model) as cache: ...; cache.report()``."""

    def __init__(self, config: CacheConfig | None = None) -> None:
        self.config = config or CacheConfig()
        self._stores: dict[tuple[str, str, int], _Store] = {}
        self._totals: Counter[str] = Counter()
        self._sites: dict[str, Counter[str]] = {}
        self._has_flops = False
        self._flops: dict[tuple[str, int], int] = {}
        self._forget()

    def claim(self, model: Any) -> Iterable[str]:
        """The cached sites, those left out with them, and the indicator of an error-gated schedule."""
        cached, left_out = _resolve(model, self.config.sites)
        schedule, self._indicator = self.config.schedule, None
        if isinstance(schedule, ErrorGated):
            self._indicator = match_sites(model, [schedule.indicator])[0]
            cached, left_out = (
                [site for site in sites if not overlap([site], [self._indicator])] for sites in (cached, left_out)
            )
            if not cached:
                raise ValueError(f"sites {self.config.sites} all lie in the indicator {self._indicator}")
        self._left_out = frozenset(left_out)
        self._has_flops = hasattr(model, "flops_at")
        self._flops.clear()
        return (*cached, *left_out, *([self._indicator] if self._indicator else []))

    def before_step(self, at: StepInfo, names: Sequence[str]) -> None:
        super().before_step(at, names)
        self._times.update({(step, stage): t for step, stage, t in at.ahead})
        if self._started is None:
            self._started = perf_counter()
            if self._indicator is None:
                self._scheduled = list(self.config.schedule.steps(at.num_steps))
        self._steps.setdefault(at.step, False)

    def reset(self) -> None:
        super().reset()
        self._totals.update(self._of_generation())
        self._forget()

    def _forget(self) -> None:
        self._stores.clear()
        self._bytes = 0
        self._scheduled: list[int] = []
        self._times: dict[tuple[int, int], float] = {}
        self._steps: dict[int, bool] = {}
        """step -> whether anything was computed in it"""
        self._started: float | None = None
        self._gate, self._decided = Gate(), -1
        self._indicated: Tensor | None = None

    def call(
        self, site: str, at: StepInfo, forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The module's own output for the branches that are due, and predictions for the others."""
        if site == self._indicator:
            out = forward(*args, **kwargs)
            self._indicate(out.detach().chunk(len(self.names))[0].float(), at)
            return out
        if self._indicator is not None and self._decided != at.step:
            raise ValueError(f"indicator: {self._indicator} has not run before {site} in step {at.step}")
        now = When(at.step, at.stage, self._times.get((at.step, at.stage)))
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        inputs = x.chunk(len(self.names))
        outs = [self._predicted(site, name, part, now) for name, part in zip(self.names, inputs, strict=True)]
        due = [i for i, out in enumerate(outs) if out is None]
        self._count(site, x, now, len(due))
        if due:
            computed = forward(*args, **kwargs)
            values = computed.chunk(len(self.names))
            for i in due:
                outs[i] = values[i]
                self._store(site, self.names[i], inputs[i], values[i].detach(), now)
            if len(due) == len(outs):
                return computed
        return cat(outs)  # type: ignore[return-value]

    def _predicted(self, site: str, name: str, x: Tensor, now: When) -> Tensor | None:
        """The value to use; None where it is to be computed."""
        store = self._stores.get((site, name, now.stage))
        if store is None or store.shape != x.shape:
            return None
        if bisect_right(self._scheduled, now.step) > bisect_right(self._scheduled, store.step):
            return None
        if store.history is None:
            return x.new_zeros(()).expand(store.output)
        return self.config.predictor.predict(store.history, now, site)

    def _store(self, site: str, name: str, x: Tensor, value: Tensor, now: When) -> None:
        key, history = (site, name, now.stage), None
        before = self._stores.get(key)
        if site not in self._left_out:
            known = before.history if before is not None and before.shape == x.shape else None
            differences = now.step >= self.config.schedule.differences_from
            history = self.config.predictor.update(known, value, now, differences=differences)
        store = self._stores[key] = _Store(now.step, x.shape, value.shape, history)
        self._bytes += store.nbytes - (0 if before is None else before.nbytes)
        self._totals["cache_bytes_peak"] = max(self._totals["cache_bytes_peak"], self._bytes)

    def _indicate(self, value: Tensor, at: StepInfo) -> None:
        """Decides once a step, by the first branch of its first call, whether the step is computed."""
        schedule, before = self.config.schedule, self._indicated
        if self._decided == at.step or not isinstance(schedule, ErrorGated):
            return
        change = inf
        if before is not None and before.shape == value.shape:
            change = float((value - before).abs().sum() / before.abs().sum())
        computes, self._gate = schedule.decide(self._gate, change, at.step, at.num_steps)
        if computes:
            self._scheduled.append(at.step)
        self._decided, self._indicated = at.step, value

    def _count(self, site: str, x: Tensor, now: When, num_due: int) -> None:
        counts = self._sites.setdefault(site, Counter())
        counts.update(computed=num_due, skipped=len(self.names) - num_due)
        if num_due:
            self._steps[now.step] = True
        elif self._has_flops:
            at = site, x.shape[1]
            if at not in self._flops:
                self._flops[at] = self.model.flops_at(*at)
            self._totals["flops_saved"] += len(x) * self._flops[at]

    def _of_generation(self) -> dict[str, Any]:
        computed = sum(self._steps.values())
        seconds = 0.0 if self._started is None else perf_counter() - self._started
        return {"steps_computed": computed, "steps_skipped": len(self._steps) - computed, "seconds": seconds}

    def report(self) -> dict[str, Any]:
        """Counts since this was made, over all generations.

        ``steps_*``: solver steps in which something was computed, or nothing. ``units_*``: site outputs of one branch.
        ``cache_bytes_peak``. ``flops_saved``: of the calls that did not happen, by the backbone's ``flops_at``; None
        where it has none. ``seconds``: from the first network call of each generation to its end. ``sites``: the units
        by site.
        """
        found = Counter(self._totals)
        found.update(self._of_generation())
        for counts in self._sites.values():
            found.update({f"units_{kind}": number for kind, number in counts.items()})
        flops = found["flops_saved"] if self._has_flops else None
        names = ("steps_computed", "steps_skipped", "units_computed", "units_skipped", "cache_bytes_peak", "seconds")
        sites = {site: dict(counts) for site, counts in self._sites.items()}
        return {**{name: found[name] for name in names}, "flops_saved": flops, "sites": sites}


def _resolve(model: Any, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sites to cache, and what to leave out where they are skipped, since nobody reads it.

    A model may name the ``feeders`` of a site: modules whose output nothing but that site reads.
    """
    cached: list[str] = []
    left_out: list[str] = []
    feeders: Mapping[str, Sequence[str]] = getattr(model, "feeders", {})
    for word in wanted:
        sites, unread = _unit(model.sites(), word) if word in UNITS else (match_sites(model, [word], words=UNITS), [])
        cached += sites
        left_out += unread + [feeder for site in sites for feeder in feeders.get(site, ())]
    if not cached:
        raise ValueError(f"sites: {tuple(wanted)} name nothing in {type(model).__name__}; give {UNITS} or patterns")
    chosen = cached + left_out
    for i, site in enumerate(chosen):
        if clash := overlap([site], chosen[i + 1 :]):
            raise ValueError(f"sites: {clash[0]} and {clash[1]} are the same or one inside the other; name one of them")
    return cached, left_out


def _unit(sites: Mapping[str, Site], word: str) -> tuple[list[str], list[str]]:
    """What a word of :data:`UNITS` stands for: cached sites, and blocks that nobody reads."""
    blocks: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site.kind == "block":
            blocks.setdefault(site.part, []).append(name)
    if word == "sublayers":
        return [name for name, site in sites.items() if site.kind in ("attention", "mlp")], []
    if word == "blocks":
        return [names[-1] for names in blocks.values()], [name for names in blocks.values() for name in names[:-1]]
    heads = {name: site.part for name, site in sites.items() if site.kind == "head"}
    return list(heads), [name for part in heads.values() for name in blocks.get(part, ())]
