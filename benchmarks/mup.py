"""muP: activations that do not depend on the width, and learning rates that transfer (arXiv 2505.15270).

    python benchmarks/mup.py                              coordinate check of DDT and DiT on digits, widths 32-512
    python benchmarks/mup.py --data fashion               the same on Fashion-MNIST
    python benchmarks/mup.py --transfer --data fashion --depth 4 --records benchmarks/results/records
                                                          400 steps at widths 32-256, learning rates by factors of 2

Claimed: under muP the slope of log size over log width is within 0.1 of zero at every layer before and after each of
the first steps, and not under the standard parametrization; the best learning rate is the same at all widths within
one factor of 2 under muP. ``--transfer`` repeats the best rate of each width on three seeds; with ``--records`` losses
of finished runs are read and kept there, and the same command continues.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import save

from untwine.training.recipe import Recipe
from untwine.training.widths import (
    PARAMETRIZATIONS,
    at_width,
    coordinate_check,
    draw_coordinates,
    draw_learning_rates,
    learning_rates,
    parametrized,
)

CLAIMED, HEAD_WIDTH = 0.1, 16
tell = partial(print, flush=True)
RECIPES = {"digits": "ddt-digits", "fashion": "ddt-fashion"}
RATES = [2.0**-k for k in range(9, 3, -1)]


def recipe_of(model: str, options: argparse.Namespace) -> Recipe:
    """The shipped recipe, or the same with a DiT of equal depth and patches that predicts velocities."""
    found = Recipe.load(RECIPES[options.data])
    if options.depth:  # an encoder of three quarters of the blocks, as in the recipes
        depths = {"depth": options.depth, "encoder_depth": options.depth * 3 // 4}
        found = replace(found, model=found.model.replace(**depths))
    if model == "dit":
        told = found.model.options
        kept = {name: told[name] for name in ("hidden_size", "depth", "num_heads", "patch_size")}
        given = found.to_dict() | {"model": {"kind": "dit", "learn_sigma": False, "predicts": "velocity", **kept}}
        found = Recipe.from_dict(given)
    fast = {"param_dtype": "bfloat16", "compile": True} if options.transfer else {}
    parallel = replace(found.train.parallel, **fast)
    train = replace(found.train, batch_size=options.batch_size, clip_norm=None, parallel=parallel)
    return at_width(replace(found, train=train), options.widths[0], head_width=HEAD_WIDTH)


def check(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """The coordinate check under both parametrizations."""
    found = {}
    for name in PARAMETRIZATIONS:
        given = parametrized(recipe, name, options.widths[0])
        found[name] = coordinate_check(
            given, options.widths, num_steps=options.steps, seeds=range(options.seeds), told=tell
        )
    return found


def transfer(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """The sweep under both parametrizations, and the losses of all seeds at the best rate of each width."""
    found = {}
    for name in PARAMETRIZATIONS:
        given = parametrized(recipe, name, options.widths[0])
        sweep = learning_rates(given, options.widths, options.lrs, **told_of(options))
        again = [seeds_at(given, width, best, options) for width, best in zip(options.widths, sweep["best"])]
        shifts = [options.lrs.index(best) - options.lrs.index(sweep["best"][0]) for best in sweep["best"]]
        found[name] = {**sweep, "seeds_at_best": again, "shift_in_grid_steps": shifts}
    return found


def told_of(options: argparse.Namespace) -> dict[str, Any]:
    kept = options.records and options.records / f"mup-{options.data}.jsonl"
    return {"num_steps": options.steps, "told": tell, "kept": kept}


def seeds_at(recipe: Recipe, width: int, lr: float, options: argparse.Namespace) -> list[float | None]:
    """The loss of each seed at one width and rate."""
    run = partial(learning_rates, widths=[width], lrs=[lr], **told_of(options))
    return [run(replace(recipe, seed=seed))["losses"][0][0] for seed in range(options.seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=RECIPES, default="digits")
    parser.add_argument("--models", nargs="+", choices=("ddt", "dit"), default=["ddt", "dit"])
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--lrs", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--depth", type=int, help="blocks; default: the recipe's")
    parser.add_argument("--records", type=Path, help="losses of the sweep's runs, read and kept here")
    parser.add_argument(
        "--out", type=Path, help="folder of results and pictures; default: benchmarks/results, docs/images"
    )
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(exist_ok=True, parents=True)
        common.RESULTS = options.out
    options.widths = options.widths or ([32, 64, 128, 256] if options.transfer else [32, 64, 128, 256, 512])
    options.steps = options.steps or (400 if options.transfer else 4)
    name = f"mup_{'transfer' if options.transfer else 'coordinates'}_{options.data}"
    pictures = options.out or common.ROOT / "docs" / "images"
    results: dict[str, Any] = {}
    for model in options.models:
        recipe = recipe_of(model, options)
        results[model] = (transfer if options.transfer else check)(recipe, options)
        draw = draw_learning_rates if options.transfer else draw_coordinates
        draw(results[model], pictures / f"{name.replace('_', '-')}-{model}.png")
    if options.transfer:
        holds = {m: max(map(abs, found["mup"]["shift_in_grid_steps"])) <= 1 for m, found in results.items()}
    else:
        holds = {m: abs(found["mup"]["largest_slope"]) <= CLAIMED for m, found in results.items()}
    facts = {
        "depth": options.depth,
        "widths": options.widths,
        "head_width": HEAD_WIDTH,
        "steps": options.steps,
        "seeds": options.seeds,
    }
    save(name, {"data": options.data, **facts, "batch_size": options.batch_size, "holds": holds, **results})


if __name__ == "__main__":
    main()
