"""``untwine accelerate [CHECKPOINT]``: a sharing plan, and what it saves and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from untwine.cli.options import brief, parse_known, show

SHARES = (0.5, 0.34, 0.2, 0.13, 0.1)
"""of the steps, at which the front compares budgets"""


@dataclass(frozen=True)
class AccelerateOptions:
    """Chooses the steps at which a decoupled model runs its encoder, measures the choice, and writes a plan for it."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = "ddt-digits"
    """a shipped name, a run folder, a saved pipeline or a hub id"""
    budget: int = 10
    """how many steps run the encoder"""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """solver steps; default: those of the checkpoint"""
    order: int = 2
    """on the other steps, forecast the encoder state by a polynomial of this degree (0-3); 0 = reuse the last"""
    cost: Literal["best", "uniform", "similarity", "velocity"] = "best"
    """evenly spread steps, or the cheapest by 1 - cosine of the states (as published) or by the error of the velocity;
    best: whichever of the three ends nearest to the exact latents"""
    out: Path = Path("out/accelerate")
    """folder for plan.json, report.json, similarity.png and front.png"""
    probe_images: int = 8
    """images on which the cost is measured"""
    images: int = 16
    """images on which the choice is judged, with other seeds"""
    front: FlagCreatePairsOff[bool] = True
    """judge the plan alone, not other budgets and methods beside it"""
    weights: Annotated[str, arg(metavar="ema:K|raw|posthoc:SIGMA")] = "ema:0"
    """which weights of a run folder"""
    device: Annotated[Literal["cpu", "cuda"] | None, arg(metavar="cpu|cuda")] = None
    """default: CUDA where there is any"""
    dtype: Literal["float32", "bfloat16"] = "float32"


ALSO = """The sampler's settings are flags as well, and default to those of the checkpoint: --guidance-scale 2.0
--guidance-interval 0 0.7 --shift 1.0 --retime ... untwine accelerate CHECKPOINT --help lists them all."""


def run(args: list[str]) -> int:
    """The verb."""
    options, rest = parse_known(AccelerateOptions, "accelerate", args, ALSO)

    from untwine.acceleration.sharing.plan import CANDIDATES, make_plan, measure_cost
    from untwine.acceleration.sharing.plots import draw_front, draw_similarity
    from untwine.acceleration.sharing.report import compare
    from untwine.pipelines.writing import prepare_folder

    pipe, sampling = _load(options, rest)
    folder, spacing = prepare_folder(options.out), sampling.num_inference_steps // options.budget
    errors: dict[str, Any] = {  # the similarity is drawn in any case
        cost: measure_cost(pipe, sampling, cost, spacing=spacing, num_images=options.probe_images)
        for cost in CANDIDATES
        if options.cost in ("best", cost) or cost == "similarity"
    }
    plan = make_plan(pipe, options.budget, sampling, cost=options.cost, num_images=options.probe_images, errors=errors)
    draw_similarity(1 - errors["similarity"], plan.refresh, folder / "similarity.png")
    judged, series = _variants(pipe, plan, errors, options)
    rows = compare(pipe, judged, num_images=options.images, seeds=(1, 2))
    rows = {name: {"series": series.get(name, name), **row} for name, row in rows.items()}
    if options.front:
        draw_front(rows, "plan", folder / "front.png")
    plan.save(folder / "plan.json")
    told = {"checkpoint": options.checkpoint, "plan": plan.refresh, "cost": plan.cost, "made": plan.made, "runs": rows}
    (folder / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _tell(options, plan, rows)
    return 0


def _load(options: AccelerateOptions, flags: list[str]) -> tuple[Any, Any]:
    """The pipeline, and its sampler with the flags of the command line; everything is checked before it is computed."""
    import torch

    from untwine.acceleration.caching.schedules import check_budget
    from untwine.acceleration.sharing.probe import check_subject
    from untwine.config import apply_flags, from_dict, to_dict
    from untwine.diffusion.sampling import Sampling
    from untwine.pipelines.loading import load

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load(options.checkpoint, weights=options.weights, device=device, dtype=getattr(torch, options.dtype))
    check_subject(pipe)
    steps = {} if options.steps is None else {"num_inference_steps": options.steps}
    settings = to_dict(pipe.sampling) | steps | {"refresh_every": 1, "refresh": None, "forecast_order": options.order}
    settings = apply_flags(Sampling, settings, flags, prog=f"untwine accelerate {options.checkpoint}")
    sampling = from_dict(Sampling, settings, "sampling")
    check_budget(options.budget, sampling.num_inference_steps)
    for name, value in (("images", options.images), ("probe_images", options.probe_images)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return pipe, sampling


def _variants(
    pipe: Any, plan: Any, errors: Mapping[str, Any], options: AccelerateOptions
) -> tuple[Any, dict[str, str]]:
    """Settings by name, and the series of each: the plan, and with ``front`` other budgets and methods."""
    from untwine.acceleration.sharing.plan import choose_steps
    from untwine.acceleration.sharing.probe import unshared
    from untwine.acceleration.sharing.report import fewer_steps

    found, series = {"plan": plan.sampling}, {"plan": _series(options.order, plan.made["cost"])}
    if not options.front:
        return found, series
    num_steps = plan.sampling.num_inference_steps
    budgets = sorted({options.budget, *(max(1, round(share * num_steps)) for share in SHARES)})
    methods = {(0, "uniform"), (0, "similarity"), (options.order, "uniform"), *((options.order, c) for c in errors)}
    for order, cost in sorted(methods):
        for budget in budgets:
            refresh, _ = choose_steps(errors.get(cost), num_steps, budget)
            name = f"{_series(order, cost)}, {budget} of {num_steps}"
            found[name] = replace(plan.sampling, refresh=refresh, forecast_order=order)
            series[name] = _series(order, cost)
    shared = [replace(plan.sampling, refresh=choose_steps(None, num_steps, budget)[0]) for budget in budgets]
    for fewer in fewer_steps(pipe, shared):
        found[f"{fewer} steps"] = replace(unshared(plan.sampling), num_inference_steps=fewer)
        series[f"{fewer} steps"] = "fewer solver steps"
    return found, series


def _series(order: int, cost: str) -> str:
    return f"{f'forecast {order}' if order else 'reuse'}, {cost}"


def _tell(options: AccelerateOptions, plan: Any, rows: Any) -> None:
    row, exact = rows["plan"], rows["exact"]
    show(
        f"{options.checkpoint}: {row['refreshed']} of {row['num_steps']} steps run the encoder",
        {
            "refresh": f"{' '.join(map(str, plan.refresh))} ({plan.made['cost']})",
            "between": f"forecast of order {options.order}" if options.order else "reuse",
            "FLOPs": f"{row['flops'] / 1e6:,.1f} M an image, {100 * row['flops_saved']:.0f} % saved",
            "time": f"{row['seconds']:.2f} s for {options.images} images, {exact['seconds']:.2f} s without",
            "drift": f"{row['drift']:.2e} mean squared distance to the exact latents",
            "cache": f"{row['cache_bytes'] / 2**20:.1f} MiB for {options.images} images",
            "sampler": brief({"steps": row["num_steps"], "guidance": plan.sampling.guidance_scale}),
        },
    )
    print(f"sample with it: untwine sample {options.checkpoint} --plan {options.out / 'plan.json'}")
