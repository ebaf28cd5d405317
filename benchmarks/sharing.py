"""Encoder sharing on a shipped checkpoint: what each way of sharing moves the final latents, and what it saves.

    python benchmarks/sharing.py --checkpoint ddt-digits
    python benchmarks/sharing.py --checkpoint ddt-fashion --images 32 --seeds 1 --quick    # a trial

For 50, 66, 80, 88 and 90 % of 50 steps shared: plain reuse at evenly spread steps, at those of the published similarity
dynamic programme and of the velocity cost; reuse with the current time; forecasts of order 1-3 at evenly spread steps
and, at order 2, at the steps of the programmes; the same with Adams-Bashforth, against its own exact run; and fewer
steps of the exact sampler at equal FLOPs. Distances are mean squared, to the exact latents of the same noise;
``against_reuse`` is the mean difference to plain reuse at evenly spread steps over the same images, with its 95 %
interval. Wall times are of one batch, taken in turn.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from common import paired, save

import untwine
from untwine.acceleration.sharing.plan import choose_steps, measure_cost
from untwine.acceleration.sharing.probe import unshared
from untwine.acceleration.sharing.report import fewer_steps, part_flops, run
from untwine.diffusion.sampling import Sampling
from untwine.diffusion.solvers import AdamsBashforth

BUDGETS = (25, 17, 10, 6, 5)
STEPS = 50


def schedules(pipe: Any, sampling: Sampling, budget: int, costs: dict[str, torch.Tensor | None]) -> dict[str, Sampling]:
    """Every way of sharing at one budget, by name."""

    def shared(cost: str, order: int = 0, **changes: Any) -> Sampling:
        error = costs[cost]
        if cost == "velocity" and order:
            ahead = replace(sampling, forecast_order=order)
            error = measure_cost(pipe, ahead, "velocity", spacing=STEPS // budget)
        return replace(sampling, refresh=choose_steps(error, STEPS, budget)[0], forecast_order=order, **changes)

    multistep = AdamsBashforth(2)
    return {
        **{f"reuse, {cost}": shared(cost) for cost in costs},
        "reuse, uniform, retimed": shared("uniform", retime=True),
        **{f"forecast {order}, uniform": shared("uniform", order) for order in (1, 2, 3)},
        **{f"forecast 2, {cost}": shared(cost, 2) for cost in ("similarity", "velocity")},
        "forecast 2, uniform, retimed": shared("uniform", 2, retime=True),
        "reuse, uniform, adams_bashforth": shared("uniform", solver=multistep),
        "forecast 2, uniform, adams_bashforth": shared("uniform", 2, solver=multistep),
    }


def distances(pipe: Any, settings: dict[str, Sampling], options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """(seeds x images,) mean squared distances to the exact latents of the same noise and solver, for each setting."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in settings}
    for seed in range(1, options.seeds + 1):  # 0 is the probe's
        for first in range(0, options.images, options.batch):
            index = torch.arange(first, min(first + options.batch, options.images))
            exact: dict[Any, torch.Tensor] = {}
            for name, sampling in settings.items():
                reference = replace(unshared(sampling), num_inference_steps=STEPS)
                if reference.solver not in exact:
                    exact[reference.solver] = run(pipe, reference, index, seed=seed).latents
                latents = run(pipe, sampling, index, seed=seed).latents
                moved = (latents - exact[reference.solver]).double().square().flatten(1).mean(1)
                found[name].append(moved.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def row(moved: torch.Tensor, reuse: torch.Tensor) -> dict[str, Any]:
    difference = moved - reuse
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    mean = float(difference.mean())
    return {
        "distance": float(moved.mean()),
        "distance_median": float(moved.median()),
        "against_reuse": {"mean": mean, "low": mean - half, "high": mean + half},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="ddt-digits")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--timed-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two budgets, one timing")
    options = parser.parse_args()
    pipe = untwine.load(options.checkpoint, device=options.device)
    sampling = replace(unshared(pipe.sampling), num_inference_steps=STEPS)
    costs = {cost: measure_cost(pipe, sampling, cost) for cost in ("uniform", "similarity", "velocity")}
    budgets = BUDGETS[1:4:2] if options.quick else BUDGETS

    settings = {}
    for budget in budgets:
        made = schedules(pipe, sampling, budget, costs)
        settings |= {f"{budget}: {name}": setting for name, setting in made.items()}
        (fewer,) = fewer_steps(pipe, [made["reuse, uniform"]])
        for name, solver in (("", sampling.solver), (", adams_bashforth", AdamsBashforth(2))):
            settings[f"{budget}: fewer steps{name}"] = replace(sampling, solver=solver, num_inference_steps=fewer)
    moved = distances(pipe, settings, options)
    timed, one = torch.arange(options.timed_batch), torch.zeros(1, dtype=torch.int64)
    runs = {name: lambda s=s: run(pipe, s, timed) for name, s in {"exact": sampling, **settings}.items()}
    seconds = paired(runs, repeats=1 if options.quick else options.repeats)
    parts = part_flops(pipe)
    exact_flops = parts.of(run(pipe, sampling, one).guided)
    rows = {}
    for name, setting in settings.items():
        reuse = moved[name.split(": ")[0] + ": reuse, uniform"]
        guided = run(pipe, setting, one).guided
        rows[name] = {
            **row(moved[name], reuse),
            "steps": setting.num_inference_steps,
            "refresh": setting.refresh,
            "flops_share": parts.of(guided) / exact_flops,
            "cache_bytes_per_image": guided.cache_bytes,
            "seconds": seconds[name]["median"],
        }
    save(
        f"sharing-{options.checkpoint}{'-quick' if options.quick else ''}",
        {
            "settings": vars(options),
            "exact": {"flops": exact_flops, "seconds": seconds["exact"]["median"]},
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
