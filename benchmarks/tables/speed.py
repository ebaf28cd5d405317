"""Time, and what is saved of it."""

from __future__ import annotations

import json
from typing import Any

from tables.results import RESULTS, result_of, source

_SPEED = {
    "forward": "forward, DDT of B shape",
    "training": "training step, width 384, 12 blocks",
}


def speed() -> list[str]:
    rows, sources = [], []
    for name, title in _SPEED.items():
        result = result_of(f"speed_{name}")
        for batch, table in result["results"].items():
            against = table["reference"].replace("reference", "official")
            for variant, row in table["rows"].items():
                low, high = row["speed_up_spread"]
                rows.append(
                    f"| {title}, {batch} | {variant.replace('reference', 'official code')} | "
                    f"{row['milliseconds']:.0f} ms | {row['gflops']:.0f} ({row['peak_share']:.0%}) | "
                    f"{row['speed_up']:.2f}x ({low:.2f}-{high:.2f}) of {against} |"
                )
        sources.append(source(result, f"python benchmarks/speed.py {name} --peer DDT"))
    return [
        "| what | variant | time | GFLOP/s (of the GEMM peak) | speed-up (spread) |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "The official DDT with the same weights, every variant timed in turn. " + "; ".join(sources),
    ]


def speed_sampling() -> list[str]:
    result = result_of("speed_sampling")
    large = RESULTS / "speed_sampling_batch8.json"
    more = json.loads(large.read_text(encoding="utf-8"))["results"] if large.is_file() else {}
    return [
        "| 50 guided steps, DDT of B shape, float32 | official | untwine | speed-up (spread) | largest difference |",
        "|---|---|---|---|---|",
        *(
            f"| {name} ({table['shared']:.0%} shared) | {table['rows']['reference']['milliseconds'] / 1000:.1f} s | "
            f"{table['rows']['untwine']['milliseconds'] / 1000:.1f} s | {table['rows']['untwine']['speed_up']:.2f}x "
            f"({table['rows']['untwine']['speed_up_spread'][0]:.2f}-{table['rows']['untwine']['speed_up_spread'][1]:.2f})"
            f" | {table['max_difference']:.0e} of {table['largest_value']:.1f} |"
            for name, table in {**result["results"], **more}.items()
        ),
        "",
        source(result, "python benchmarks/speed.py sampling --peer DDT"),
    ]


def sampling() -> list[str]:
    result = result_of("sampling_paths")
    settings = result["settings"]
    rows = {
        "branches of weight 0 not run": "skipping",
        f"the same, encoder shared over {settings['refresh_every']} steps": "skipping_when_shared",
        "decoder modulations cached, encoder shared": "modulations",
        "both, encoder shared": "both_when_shared",
    }
    width, steps = settings["width"], settings["steps"]
    return [
        f"| sampling, DDT width {width}, 256 tokens, {steps} steps, guidance on (0, 0.7) | speed-up | difference |",
        "|---|---|---|",
        *(f"| {name} | {result[key]['speed_up']:.2f}x | {_difference(result[key])} |" for name, key in rows.items()),
        "",
        "Against evaluating both branches at every step, interleaved; largest difference over largest value. "
        + source(result, "python benchmarks/sampling_paths.py"),
    ]


def _difference(row: dict[str, float]) -> str:
    return f"{row['max_difference_relative']:.0e}" if row["max_difference_relative"] else "none, bitwise"


def economy() -> list[str]:
    """The latent cache, averages, and how wrong a plan is."""
    cache, averages, plans = (result_of(name) for name in ("latent_cache", "speed_optimizer", "plan_check"))
    ready, taken = cache["batch_ready_images_per_second"], averages["results"]["milliseconds"]
    names = ("untwine constant", "torch AveragedModel", "diffusers EMAModel")
    ours, torchs, diffusers = (taken[f"average: {name}"] for name in names)
    memory, seconds = ([row[key] for row in plans["rows"]] for key in ("memory_error", "time_error"))
    return [
        "| economy | measured |",
        "|---|---|",
        f"| latent cache, built by one and by two processes | {_both(cache['build'])} images/s |",
        f"| batches ready, from the cache | {ready['cache']:.0f} images/s, {ready['pictures']:.0f} with encoding |",
        f"| training step, from the cache against encoding | {cache['step_speedup']:.1f}x |",
        f"| update of an average of {averages['results']['parameter_gib']} GiB | "
        f"{ours:.1f} ms (torch {torchs:.1f}, diffusers {diffusers:.1f}) |",
        f"| `untwine plan` on {len(memory)} shapes, this CPU: memory | {min(memory):+.0%} to {max(memory):+.0%} |",
        f"| the same: time, at the efficiency of the first shape | {min(seconds):+.0%} to {max(seconds):+.0%} |",
        "",
        "; ".join(
            source(result, f"python benchmarks/{script}")
            for result, script in (
                (cache, "latent_cache.py"),
                (averages, "speed.py optimizer"),
                (plans, "plan_check.py"),
            )
        ),
    ]


def _both(build: dict[str, Any]) -> str:
    return f"{build['images_per_second']:.0f} and {build['by_two_processes']['images_per_second']:.0f}"


def studio() -> list[str]:
    result = result_of("studio")
    starts, busy = result["starts"], result["at_once"]
    longest = {name: max(start[name] for start in starts) for name in starts[0]}
    return [
        "| the studio, longest of " + f"{len(starts)} starts | measured | asked |",
        "|---|---|---|",
        f"| from `untwine app` to the page | {longest['page']:.1f} s | |",
        f"| to the first picture on it (`ddt-digits`) | {longest['first_picture']:.1f} s | 15 s |",
        f"| {busy['requests']} requests at once, {busy['images']} images of {busy['steps']} steps each: median, p95 | "
        f"{busy['median']:.1f} s, {busy['p95']:.1f} s (alone {busy['alone_median']:.2f} s) | |",
        "",
        source(result, "python benchmarks/studio.py"),
    ]
