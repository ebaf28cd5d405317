"""Encoder sharing on a shipped checkpoint: what each way of sharing moves the final latents, and what it saves.

    python benchmarks/sharing.py --checkpoint ddt-digits --reference digits
    python benchmarks/sharing.py --checkpoint ddt-fashion --reference fashion --work out/sharing    # hours; continues
    python benchmarks/sharing.py --checkpoint ddt-fashion --images 32 --seeds 1 --quick    # a trial

``ddt-emoji`` takes hours longer: ``--without retimed "uniform, adams_bashforth" "forecast 2, similarity"``.

For 50, 66, 80, 88 and 90 % of 50 steps shared: plain reuse at evenly spread steps, at those of the published similarity
dynamic programme and of the velocity cost; reuse with the current time; forecasts of order 1-3 at evenly spread steps
and, at order 2, at the steps of the programmes; the same with Adams-Bashforth, against its own exact run; and fewer
steps of the exact sampler at equal FLOPs. Distances are mean squared, to the exact latents of the same noise;
``against_reuse`` is the mean difference to plain reuse at evenly spread steps over the same images, with its 95 %
interval. ``fd`` is the Frechet distance of EfficientNet-Lite0 features of all these images to ``--reference``, beside
its floor. Wall times are of one batch, taken in turn. ``orders`` tells what a programme over steps and orders together
would gain: the summed velocity error of each single order, and of the best order for every stretch.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import paired, save
from safetensors.torch import load_file, save_file
from torch import Tensor

import untwine
from untwine.acceleration.caching.schedules import dynamic_programming, segment_costs
from untwine.acceleration.sharing.plan import choose_steps, measure_cost
from untwine.acceleration.sharing.probe import unshared
from untwine.acceleration.sharing.report import fewer_steps, part_flops, run
from untwine.diffusion.sampling import Sampling
from untwine.diffusion.solvers import AdamsBashforth
from untwine.evaluation.evaluator import floor, measure
from untwine.evaluation.extraction import Extractor
from untwine.evaluation.protocols import find_protocol
from untwine.evaluation.references import build_bank, open_reference

BUDGETS = (25, 17, 10, 6, 5)
STEPS = 50


def schedules(pipe: Any, sampling: Sampling, budget: int, costs: dict[str, Tensor | None]) -> dict[str, Sampling]:
    """Every way of sharing at one budget, by name."""

    def shared(cost: str, order: int = 0, **changes: Any) -> Sampling:
        error = costs[cost]
        if cost == "velocity" and order:
            ahead = replace(sampling, forecast_order=order)
            error = measure_cost(pipe, ahead, "velocity", spacing=STEPS // budget)
        return replace(sampling, refresh=choose_steps(error, STEPS, budget)[0], forecast_order=order, **changes)

    multistep = AdamsBashforth(2)
    (fewer,) = fewer_steps(pipe, [shared("uniform")])
    return {
        **{f"reuse, {cost}": shared(cost) for cost in costs},
        "reuse, uniform, retimed": shared("uniform", retime=True),
        **{f"forecast {order}, uniform": shared("uniform", order) for order in (1, 2, 3)},
        **{f"forecast 2, {cost}": shared(cost, 2) for cost in ("similarity", "velocity")},
        "forecast 2, uniform, retimed": shared("uniform", 2, retime=True),
        "reuse, uniform, adams_bashforth": shared("uniform", solver=multistep),
        "forecast 2, uniform, adams_bashforth": shared("uniform", 2, solver=multistep),
        "fewer steps": replace(sampling, num_inference_steps=fewer),
        "fewer steps, adams_bashforth": replace(sampling, num_inference_steps=fewer, solver=multistep),
    }


def orders(pipe: Any, sampling: Sampling, budgets: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Summed velocity error of the best steps, by budget, for each order and for the best order on each stretch."""
    found = {}
    for budget in budgets:
        errors = {
            f"order {order}": measure_cost(
                pipe, replace(sampling, forecast_order=order), "velocity", spacing=STEPS // budget
            )
            for order in range(4)
        }
        costs = {name: segment_costs(error) for name, error in errors.items() if error is not None}
        costs["best for each stretch"] = torch.stack(list(costs.values())).amin(0)
        found[str(budget)] = {name: dynamic_programming(cost, budget)[1] for name, cost in costs.items()}
    return found


class Measured:
    """Distances and features of every setting, batch after batch; finished batches are kept in ``work``."""

    def __init__(self, pipe: Any, settings: dict[str, Sampling], options: argparse.Namespace) -> None:
        self.pipe, self.settings, self.options = pipe, settings, options
        self.protocol = replace(
            find_protocol("fd-efflite0-1k", num_samples=options.images * options.seeds), metrics=("fd",)
        )
        self.bank = self.encoder = None
        if options.reference:
            self.encoder = self.protocol.build_encoder()
            cache = options.work / "references" if options.work else None
            real = open_reference(options.reference)
            self.bank = build_bank(real, self.encoder, self.protocol, pipe.latent_shape[1:], cache=cache)
        parts = [
            self._kept(seed, first)
            for seed in range(1, options.seeds + 1)  # 0 is the probe's
            for first in range(0, options.images, options.batch)
        ]
        self.values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def moved(self, name: str) -> Tensor:
        """(seeds x images,) mean squared distances to the exact latents of the same noise and solver."""
        return self.values[f"moved/{name}"]

    def distance(self, name: str) -> dict[str, float]:
        """The Frechet distance to the reference, where there is one."""
        if self.bank is None:
            return {}
        extractor = Extractor(self.encoder, 64)
        extractor.update(self.values[f"image/{name}"])
        found, _ = measure(extractor.gathered(), self.bank, self.protocol)
        return {"fd": found["fd"]}

    def floor(self) -> dict[str, Any] | None:
        axes = self.protocol.axes_for(self.protocol.num_samples, None)
        return None if self.bank is None else floor(self.bank, self.protocol, axes)

    def _kept(self, seed: int, first: int) -> dict[str, Tensor]:
        file = (
            self.options.work / f"{self.options.checkpoint}-{seed}-{first}.safetensors" if self.options.work else None
        )
        if file is not None and file.is_file():
            kept = load_file(file)
            wanted = [
                f"{of}/{name}" for of in ("moved", "image") for name in self.settings if of == "moved" or self.bank
            ]
            if kept.keys() >= set(wanted):
                return {name: kept[name] for name in wanted}
        index = torch.arange(first, min(first + self.options.batch, self.options.images))
        found = self._batch(seed, index)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(found, file)
        return found

    def _batch(self, seed: int, index: Tensor) -> dict[str, Tensor]:
        exact: dict[Any, Tensor] = {}
        found = {}
        for name, sampling in self.settings.items():
            reference = replace(unshared(sampling), num_inference_steps=STEPS)
            if reference.solver not in exact:
                exact[reference.solver] = run(self.pipe, reference, index, seed=seed).latents
            latents = exact[reference.solver]
            if sampling != reference:
                latents = run(self.pipe, sampling, index, seed=seed).latents
            moved = (latents - exact[reference.solver]).double().square().flatten(1).mean(1)
            found[f"moved/{name}"] = moved.cpu()
            if self.bank is not None:
                found[f"image/{name}"] = self.pipe.codec.to_pixels(latents).cpu().contiguous()
        return found


def row(moved: Tensor, reuse: Tensor) -> dict[str, Any]:
    difference = moved - reuse
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    mean = float(difference.mean())
    return {
        "distance": float(moved.mean()),
        "distance_median": float(moved.median()),
        "against_reuse": {"mean": mean, "low": mean - half, "high": mean + half},
    }


def table(pipe: Any, measured: Measured, seconds: dict[str, dict[str, float]]) -> tuple[int, dict[str, Any]]:
    """(FLOPs of an exact image, a row for every setting)."""
    parts, one = part_flops(pipe), torch.zeros(1, dtype=torch.int64)
    exact = parts.of(run(pipe, measured.settings["exact"], one).guided)
    rows = {}
    for name, setting in measured.settings.items():
        budget = name.split(": ")[0]
        guided = run(pipe, setting, one).guided
        compared = row(measured.moved(name), measured.moved(f"{budget}: reuse, uniform")) if ": " in name else {}
        rows[name] = {
            **compared,
            **measured.distance(name),
            "steps": setting.num_inference_steps,
            "refresh": setting.refresh,
            "flops_share": parts.of(guided) / exact,
            "cache_bytes_per_image": guided.cache_bytes,
            "seconds": seconds[name]["median"],
        }
    return exact, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="ddt-digits")
    parser.add_argument("--reference", help="as of untwine evaluate; default: no Frechet distance")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--timed-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="keep finished batches here, and continue from them")
    parser.add_argument("--without", nargs="+", default=[], help="leave out the ways with these words in their names")
    parser.add_argument("--quick", action="store_true", help="two budgets, one timing")
    options = parser.parse_args()
    pipe = untwine.load(options.checkpoint, device=options.device)
    sampling = replace(unshared(pipe.sampling), num_inference_steps=STEPS)
    costs = {cost: measure_cost(pipe, sampling, cost) for cost in ("uniform", "similarity", "velocity")}
    budgets = BUDGETS[1:4:2] if options.quick else BUDGETS
    settings = {"exact": sampling, "exact, adams_bashforth": replace(sampling, solver=AdamsBashforth(2))}
    for budget in budgets:
        ways = schedules(pipe, sampling, budget, costs).items()
        settings |= {f"{budget}: {way}": s for way, s in ways if not any(word in way for word in options.without)}
    measured = Measured(pipe, settings, options)
    timed = torch.arange(options.timed_batch)
    runs = {name: lambda s=s: run(pipe, s, timed) for name, s in settings.items()}
    seconds = paired(runs, repeats=1 if options.quick else options.repeats)
    flops, rows = table(pipe, measured, seconds)
    exact = {"flops": flops, **{name: rows["exact"][name] for name in ("seconds", "fd") if name in rows["exact"]}}
    told = {key: value for key, value in vars(options).items() if key not in ("work", "reference")}
    save(
        f"sharing-{options.checkpoint}{'-quick' if options.quick else ''}",
        {
            "settings": told,
            "exact": exact,
            "floor": measured.floor(),
            "orders": orders(pipe, sampling, budgets),
            "rows": {name: values for name, values in rows.items() if ": " in name},
        },
    )


if __name__ == "__main__":
    main()
