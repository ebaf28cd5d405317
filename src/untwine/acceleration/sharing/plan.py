"""A sharing plan: sampler settings with the steps that recompute the encoder state, bound to one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import untwine
from untwine.acceleration.caching.schedules import (
    check_budget,
    dynamic_programming,
    segment_costs,
    uniform_budget,
)
from untwine.acceleration.sharing.probe import Subject, check_subject, similarity, velocity_error
from untwine.acceleration.sharing.report import compare
from untwine.config import from_dict, to_dict
from untwine.diffusion.sampling import Sampling

Cost = Literal["uniform", "similarity", "velocity", "best"]
CANDIDATES: tuple[Cost, ...] = ("uniform", "similarity", "velocity")
BROUGHT = ("refresh_every", "refresh", "forecast_order", "forecast_in", "retime")
"""settings that a plan brings: a sampler has the same or leaves them at their defaults"""


@dataclass(frozen=True)
class SharingPlan:
    """When the encoder runs and what stands in for it in between, for one sampler and one model.

    ``pipe(..., plan=plan)``, ``untwine.sample(..., plan=plan)`` and ``untwine sample --plan plan.json`` use it.
    """

    sampling: Sampling
    """all settings, with ``refresh``, ``forecast_order``, ``forecast_in`` and ``retime``"""
    model: str
    """:func:`model_hash` of the weights"""
    cost: float | None = None
    """what the schedule costs by the measure that chose it; None = it was not measured"""
    made: dict[str, Any] = field(default_factory=dict)
    """how: cost, probe, versions"""

    def __post_init__(self) -> None:
        if self.sampling.refresh is None:
            raise ValueError("sampling.refresh must name the steps that recompute the encoder state, got None")

    @property
    def refresh(self) -> tuple[int, ...]:
        """The steps that recompute the encoder state."""
        assert self.sampling.refresh is not None
        return self.sampling.refresh

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        data = {**vars(self), "sampling": to_dict(self.sampling)}
        Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SharingPlan:
        """Reads a plan; a file that is not one raises ValueError."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            sampling = from_dict(Sampling, data.pop("sampling"), "plan.sampling")
            return cls(sampling, **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"plan: {path} is no sharing plan: {error}; make one with untwine accelerate") from error

    def settings(self, model: Any, sampling: Sampling | None = None, **changes: Any) -> Sampling:
        """The plan's settings for ``sampling``, which must be those it was made for (None = they are).

        Raises:
            ValueError: for another sampler or other weights; the message names the field, both values and the fix.
        """
        brought = {name: getattr(Sampling(), name) for name in BROUGHT}
        asked = replace(sampling or replace(self.sampling, **brought), **changes)
        budget = asked.modulation_budget_mib  # changes no image
        given = to_dict(asked)
        for name, planned in to_dict(replace(self.sampling, modulation_budget_mib=budget)).items():
            allowed = (planned, brought[name]) if name in brought else (planned,)
            if given[name] not in allowed:
                raise ValueError(
                    f"plan: it was made for {name} = {planned}, and the sampler has {name} = {given[name]}; set "
                    f"{name} to {planned}, or make a plan for this sampler with untwine accelerate"
                )
        if (found := model_hash(model)) != self.model:
            raise ValueError(
                f"plan: it was made for the weights {self.model[:12]}, and this model's are {found[:12]}; load that "
                "checkpoint, or make a plan for this one with untwine accelerate"
            )
        return replace(self.sampling, modulation_budget_mib=budget)


def model_hash(model: torch.nn.Module) -> str:
    """SHA-256 of names and values of all weights, rounded to bfloat16: the same in either precision."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        rounded = value.detach().to(torch.bfloat16) if value.is_floating_point() else value.detach()
        digest.update(rounded.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure_cost(
    pipe: Subject, sampling: Sampling, cost: Cost, *, spacing: int = 1, num_images: int = 8, seed: int = 0
) -> Tensor | None:
    """The (N, N) matrix ``error[j, l]`` of a cost by name; None for ``uniform``, which measures nothing."""
    if cost == "uniform":
        return None
    if cost == "similarity":
        return 1 - similarity(pipe, sampling, num_images=num_images, seed=seed)
    if cost != "velocity":
        raise ValueError(f"cost must be {', '.join(map(repr, get_args(Cost)))}, got {cost!r}")
    return velocity_error(pipe, sampling, num_images=num_images, seed=seed, spacing=spacing)


def choose_steps(error: Tensor | None, num_steps: int, budget: int) -> tuple[tuple[int, ...], float | None]:
    """The ``budget`` refreshes of least summed error and that sum; evenly spread ones where nothing was measured."""
    if error is None:
        return uniform_budget(num_steps, budget), None
    return dynamic_programming(segment_costs(error), budget)


def make_plan(
    pipe: Subject,
    budget: int,
    sampling: Sampling,
    *,
    cost: Cost = "best",
    num_images: int = 8,
    seed: int = 0,
    errors: Mapping[str, Tensor | None] | None = None,
) -> SharingPlan:
    """The plan that recomputes the encoder state at ``budget`` steps, the first among them.

    ``similarity`` is the published choice; ``velocity`` measures what ``sampling`` does between the refreshes, its
    forecasts included; ``uniform`` spreads the refreshes evenly. ``best`` samples with all three and takes the one
    whose final latents are nearest to the exact ones (in the median over the probe's images: a few images make most of
    a mean).

    Args:
        budget: refreshes, in [1, sampling.num_inference_steps].
        sampling: with the ``forecast_order``, ``forecast_in`` and ``retime`` that the plan shall have.
        num_images, seed: of the probe.
        errors: matrices that have been measured already, by cost.
    """
    check_subject(pipe)
    num_steps = sampling.num_inference_steps
    check_budget(budget, num_steps)
    probe: Any = {"num_images": num_images, "seed": seed}
    if cost == "best":
        plans = {c: make_plan(pipe, budget, sampling, cost=c, errors=errors, **probe) for c in CANDIDATES}
        rows = compare(pipe, {c: plan.sampling for c, plan in plans.items()}, num_images=num_images, seeds=(seed,))
        drifts = {c: rows[c]["drift_median"] for c in plans}
        best = plans[min(drifts, key=drifts.__getitem__)]
        return replace(best, made={**best.made, "drift_of_candidates": drifts})
    known = errors or {}
    error = known[cost] if cost in known else measure_cost(pipe, sampling, cost, spacing=num_steps // budget, **probe)
    refresh, expected = choose_steps(error, num_steps, budget)
    made = {"cost": cost, **probe, "untwine": untwine.__version__}
    return SharingPlan(replace(sampling, refresh=refresh, refresh_every=1), model_hash(pipe.model), expected, made)


def as_plan(plan: SharingPlan | str | Path) -> SharingPlan:
    """A plan, or the file that holds one."""
    return plan if isinstance(plan, SharingPlan) else SharingPlan.load(plan)
