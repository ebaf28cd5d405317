"""Writes the figures of the README from ``benchmarks/results/*.json``, between its two marks.

python benchmarks/readme.py            rewrites the README
python benchmarks/readme.py --check    exits with 1 where it has drifted
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: python benchmarks/readme.py -->", "<!-- end of figures -->"


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _source(result: dict[str, Any], script: str) -> str:
    m = result["hardware"]
    return f"`{script}`, commit `{result['commit']}`, {m['cpu']}, {m['threads']} threads, torch {m['torch']}"


def _judged(checks: dict[str, Any], real: str, unseen: str, share: str) -> list[str]:
    """Rows of a table ``| what | measured | asked |`` on recognition and copies."""
    return [
        f"| recognised by a classifier of real {real} (itself {checks['classifier_accuracy']:.1%} right) | "
        f"{checks['recognised']:.1%} | {share} |",
        f"| within-class distance over that of real {real} | {checks['diversity']:.2f} | 0.8 |",
        f"| distance to the nearest training image over that of {unseen} ones | {checks['novelty']:.2f} | 0.8 |",
    ]


def demo() -> list[str]:
    result = _result("demo")
    return [
        "| `make demo` | measured | asked |",
        "|---|---|---|",
        f"| running time, {result['steps']} training steps and 500 samples | {result['total_seconds']:.0f} s | 360 s |",
        f"| training | {result['training_seconds']:.0f} s | about 120 s |",
        *_judged(result["checks"], "digits", "held-out", "95 %"),
        "",
        _source(result, "python benchmarks/demo.py --record"),
    ]


def fashion() -> list[str]:
    result = _result("fashion")
    return [
        f"| `ddt-fashion`, {result['checks']['images']} samples | measured | asked |",
        "|---|---|---|",
        *_judged(result["checks"], "images", "test", "90 %"),
        "",
        _source(result, "python benchmarks/fashion_report.py --record"),
    ]


def sampling() -> list[str]:
    result = _result("sampling_paths")
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
        + _source(result, "python benchmarks/sampling_paths.py"),
    ]


def faults() -> list[str]:
    result = _result("faults")
    return [
        "| `make faults`: fault | runs | go on bitwise | refused | most steps lost | worst |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['fault']} | {row['runs']} | {row.get('survived', '')} | {row.get('refused', '')} | "
            f"{row.get('steps_lost', '')} | {_seconds(row)} |"
            for row in result["rows"]
        ),
        "",
        f"A checkpoint every {result['save_every']} steps; {result['kills_save_every']} in the first row. "
        + _source(result, "python benchmarks/faults.py"),
    ]


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['worst_seconds']:.2g} s" if "worst_seconds" in row else ""


def _difference(row: dict[str, float]) -> str:
    return f"{row['max_difference_relative']:.0e}" if row["max_difference_relative"] else "none, bitwise"


def reliability() -> list[str]:
    killed, imports = _result("kill_resume"), _result("imports")
    seconds = imports["seconds"]
    return [
        "| reliability and start-up | measured |",
        "|---|---|",
        f"| SIGKILL at random moments, AdamW and Muon, float32 and bf16 | {killed['kills']} kills, "
        f"{killed['runs_bitwise_equal']} runs end bitwise equal to the uninterrupted one |",
        f"| `import untwine` beyond Python itself | "
        f"{seconds['import untwine']['median'] - seconds['python -c pass']['median']:.3f} s |",
        f"| `untwine --help` beyond Python itself | "
        f"{seconds['untwine --help']['median'] - seconds['python -c pass']['median']:.3f} s |",
        "",
        _source(killed, "python benchmarks/kill_resume.py") + "; `python benchmarks/imports.py`",
    ]


def comparison() -> list[str]:
    return _compared("ddt_vs_dit", "python benchmarks/ddt_vs_dit.py")


def comparison_fashion() -> list[str]:
    return _compared("ddt_vs_dit_fashion", "python benchmarks/ddt_vs_dit.py --data fashion")


def _compared(name: str, command: str) -> list[str]:
    result = _result(name)
    settings, means, runs = result["settings"], result["means"], result["runs"]
    data = settings["data"]["kind"]
    return [
        f"| {settings['depth']} blocks of width {settings['width']} on {data}, "
        f"{settings['steps']} steps, {settings['seeds']} seeds | "
        "parameters | held-out loss | training loss | FD-EffLite0 (floor) | ms a step |",
        "|---|---|---|---|---|---|",
        *(
            f"| {title} | {runs[key][0]['parameters']:,} | {_spread(runs[key], 'validation_loss')} | "
            f"{means[key]['training_loss']:.4f} | {_last_distance(runs[key])} | "
            f"{1000 * result['step_seconds'][key]['median']:.0f} |"
            for title, key in (("DDT", "ddt"), ("improved DiT", "improved_dit"))
        ),
        "",
        f"![losses and distances of both](docs/images/ddt-vs-dit-{data}.png)",
        "",
        f"Means over seeds, with the lowest and highest loss; every run and its curve is in "
        f"`benchmarks/results/{name}.json`. " + _source(result, command),
    ]


def _spread(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{sum(values) / len(values):.4f} ({min(values):.4f}-{max(values):.4f})"


def _last_distance(runs: list[dict[str, Any]]) -> str:
    last = [run["distances"][-1] if run["distances"] else run for run in runs]
    mean, floor = (sum(point[key] for point in last) / len(last) for key in ("fd", "floor"))
    return f"{mean:.1f} ({floor:.1f})"


def checkpoints() -> list[str]:
    result = _result("checkpoints")
    rows = []
    for name, found in result["checkpoints"].items():
        metrics, floor, near = found["metrics"], found["floor"], found["memorisation"]["features"]
        rows.append(
            f"| `{name}` | {found['counts']['samples']} | {metrics['fd']:.1f} ({floor['fd']:.1f}) | "
            f"{metrics['kid']:.4f} | {metrics['precision']:.2f} | {metrics['recall']:.2f} | "
            f"{near['median_ratio']:.2f}, {near['copies']} copies |"
        )
    return [
        "| checkpoint | samples | FD-EffLite0 (floor: real against real) | KID | precision | recall | nearest real "
        "picture, in held-out ones' distances |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "On 64 principal axes of the real pictures' features. " + _source(result, "python benchmarks/checkpoints.py"),
    ]


_SPEED = {
    "forward": "forward, DDT of B shape",
    "training": "training step, width 384, 12 blocks",
}


def speed() -> list[str]:
    rows, sources = [], []
    for name, title in _SPEED.items():
        result = _result(f"speed_{name}")
        for batch, table in result["results"].items():
            against = table["reference"].replace("reference", "official")
            for variant, row in table["rows"].items():
                low, high = row["speed_up_spread"]
                rows.append(
                    f"| {title}, {batch} | {variant.replace('reference', 'official code')} | "
                    f"{row['milliseconds']:.0f} ms | {row['gflops']:.0f} ({row['peak_share']:.0%}) | "
                    f"{row['speed_up']:.2f}x ({low:.2f}-{high:.2f}) of {against} |"
                )
        sources.append(_source(result, f"python benchmarks/speed.py {name} --peer DDT"))
    return [
        "| what | variant | time | GFLOP/s (of the GEMM peak) | speed-up (spread) |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "The official DDT with the same weights, every variant timed in turn. " + "; ".join(sources),
    ]


def speed_sampling() -> list[str]:
    result = _result("speed_sampling")
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
        _source(result, "python benchmarks/speed.py sampling --peer DDT"),
    ]


_WAYS = {
    "reuse, uniform": "reuse",
    "reuse, similarity": "reuse, published dynamic programme",
    "forecast 1, uniform": "forecast, order 1",
    "forecast 2, uniform": "forecast, order 2",
    "forecast 2, similarity": "forecast, order 2, dynamic programme",
    "forecast 2, velocity": "forecast, order 2, steps by the velocity's error",
    "fewer steps": "fewer Euler steps at equal FLOPs",
    "fewer steps, adams_bashforth": "fewer Adams-Bashforth steps at equal FLOPs",
}


def sharing() -> list[str]:
    return _shared("sharing-ddt-digits", "python benchmarks/sharing.py --reference digits")


def sharing_fashion() -> list[str]:
    return _shared(
        "sharing-ddt-fashion", "python benchmarks/sharing.py --checkpoint ddt-fashion --reference fashion --without ..."
    )


def _shared(name: str, command: str) -> list[str]:
    """A row for every budget: the distance of each way, with its Frechet distance where that was measured."""
    result = _result(name)
    found, exact, floor = result["rows"], result["exact"], result.get("floor")
    budgets = sorted({int(name.split(":")[0]) for name in found}, reverse=True)
    names = [way for way in _WAYS if f"{budgets[0]}: {way}" in found]
    judged = (
        f"; in brackets FD-EffLite0, of the exact ones {exact['fd']:.1f}, its floor {floor['fd']:.1f}" if floor else ""
    )
    return [
        f"| `{result['settings']['checkpoint']}`, 50 steps: refreshes | " + " | ".join(_WAYS[w] for w in names) + " |",
        "|---" * (len(names) + 1) + "|",
        *(
            f"| {budget} ({1 - budget / 50:.0%} shared) | "
            + " | ".join(_moved(found[f"{budget}: {way}"]) for way in names)
            + " |"
            for budget in budgets
        ),
        "",
        f"Mean squared distance of the final latents to the exact ones, {result['settings']['images']} images x "
        f"{result['settings']['seeds']} seeds{judged}. " + _source(result, command),
    ]


def _moved(row: dict[str, Any]) -> str:
    return f"{row['distance']:.1e}" + (f" ({row['fd']:.1f})" if "fd" in row else "")


def foreign() -> list[str]:
    result = _result("foreign_caching")
    rows = []
    for family in ("flux", "wan"):
        for name, row in result[family]["rows"].items():
            told = f"{row['flops_ratio']:.2f}x | {row['speedup']:.2f}x | {row['rms_difference']:.1e}"
            rows.append(f"| {family.upper() if family == 'flux' else 'Wan'}-shaped | {name} | {told} |")
    return [
        f"| pipelines of diffusers, random weights, {result['settings']['steps']} steps | way | fewer FLOPs | "
        "speed-up | RMS difference |",
        "|---|---|---|---|---|",
        *rows,
        "",
        _source(result, "python benchmarks/foreign_caching.py"),
    ]


def economy() -> list[str]:
    """The latent cache, averages, and how wrong a plan is."""
    cache, averages, plans = (_result(name) for name in ("latent_cache", "speed_optimizer", "plan_check"))
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
            _source(result, f"python benchmarks/{script}")
            for result, script in (
                (cache, "latent_cache.py"),
                (averages, "speed.py optimizer"),
                (plans, "plan_check.py"),
            )
        ),
    ]


def _both(build: dict[str, Any]) -> str:
    return f"{build['images_per_second']:.0f} and {build['by_two_processes']['images_per_second']:.0f}"


def style() -> list[str]:
    result = _result("style_transfer")
    settings = result["settings"]
    return [
        f"| style transfer of emoji, {settings['steps']} steps | KID to Twitter's set | distance to Twitter's drawing "
        "(1 = Google's) | held-out loss | size |",
        "|---|---|---|---|---|",
        *(_style_row(name, row) for name, row in result["models"].items()),
        "",
        f"{settings['held_out']} held-out emoji redrawn from t = {settings['strength']}. "
        + _source(result, "python benchmarks/style_transfer.py"),
    ]


def _style_row(name: str, row: dict[str, float]) -> str:
    kid = f"{row['kid']:.3f} +- {row['kid_std']:.3f}"
    if "loss" not in row:
        return f"| {name} | {kid} | 1 | | |"
    size = f"{row['megabytes']:.2f} MB" if "megabytes" in row else ""
    return (
        f"| {name} | {kid} | {row['distance_to_target']:.3f} +- {row['interval_95']:.3f} | {row['loss']:.4f} | {size} |"
    )


def text() -> list[str]:
    result = _result("text_to_image")
    rows = (("real held-out emoji (the ceiling)", result["ceiling"]), ("drawn from their names", result["generated"]))
    return [
        f"| `{result['checkpoint']}`: held-out names, top-1 of 10 | right | 95 % interval | names | pictures |",
        "|---|---|---|---|---|",
        f"| chance | {result['chance']:.0%} | | | |",
        *(
            f"| {name} | {row['top1_of_10']:.1%} | {row['interval_95'][0]:.1%}-{row['interval_95'][1]:.1%} | "
            f"{row['emoji']} | {row['pictures']} |"
            for name, row in rows
        ),
        "",
        f"{result['share_of_the_way']:.0%} of the way from chance to the ceiling, by a scorer fitted to real training "
        "emoji. " + _source(result, "python benchmarks/text_to_image.py --checkpoint ddt-emoji-text --record"),
    ]


def scale() -> list[str]:
    result, saved = _result("scaling"), _result("saving")
    speeds, seconds = result["throughput"], saved["seconds"]
    one = speeds["one process, 1 thread"]["images_per_second"]
    return [
        f"| against one process | sample order | SGD, 50 steps: largest difference | AdamW, 20 steps: relative "
        f"distance | largest gap of the loss in {result['steps']} steps |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {'identical' if row['sgd']['order_identical'] else 'DIFFERS'} | {row['sgd']['largest']:.0e} | "
            + (f"{row['adamw']['relative']:.0e} | {row['largest_gap']:.0e} |" if "adamw" in row else "| |")
            for name, row in list(result["layouts"].items())[1:]
        ),
        "",
        "![the curves over each other](docs/images/scaling.png)",
        "",
        "| on the same two cores | images/s | of twice one thread |",
        "|---|---|---|",
        *(
            f"| {name} | {row['images_per_second']:.0f} | {row['images_per_second'] / one / 2:.0%} |"
            for name, row in speeds.items()
        ),
        "",
        f"| a checkpoint of {saved['gigabytes']:.2f} GB | seconds |",
        "|---|---|",
        f"| training waits, written at once | {seconds['at_once']:.2f} |",
        f"| training waits, `train.async_save` | {seconds['stall']:.3f} |",
        f"| hashes checked before reading | {seconds['verify']:.2f} ({saved['verify_seconds_per_gb']:.2f} s/GB) |",
        "",
        _source(result, "python benchmarks/scaling.py") + "; `python benchmarks/saving.py`",
    ]


def studio() -> list[str]:
    result = _result("studio")
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
        _source(result, "python benchmarks/studio.py"),
    ]


def claims() -> list[str]:
    mean_flow, width, noise = (_result(name) for name in ("mean_flow", "width_claim", "rae_noise"))
    runs = mean_flow["runs"]
    euler, one = (sum(run[key] for run in runs) / len(runs) for key in ("euler_1", "mean_flow_1"))
    gains = {name: of["0.3"] for name, of in noise["gain_db"].items()}
    return [
        "| published claim, on small real data | asked | measured |",
        "|---|---|---|",
        f"| MeanFlow, one step: energy distance to held-out digits below one Euler step's, {len(runs)} seeds | 30 % | "
        f"{mean_flow['mean_reduction']:.0%} ({one:.2f} against {euler:.2f}) |",
        f"| a DiT narrower than its tokens cannot fit one latent: loss at width 24 over width 64 (RAE), "
        f"{len(width['runs'])} seeds | 5 | {width['smallest_ratio']:.1f} at least |",
        *(
            f"| RAE's decoder trained on noisy latents (tau 0.8): PSNR of {name} from latents with noise 0.3, "
            f"{len(values)} seeds | +1 dB | {min(values):+.2f} to {max(values):+.2f} dB |"
            for name, values in gains.items()
        ),
        "",
        "; ".join(
            _source(result, f"python benchmarks/{result['benchmark']}.py") for result in (mean_flow, width, noise)
        ),
    ]


PARTS = {
    demo: "demo",
    fashion: "fashion",
    checkpoints: "checkpoints",
    speed: "speed_training",
    speed_sampling: "speed_sampling",
    sampling: "sampling_paths",
    sharing: "sharing-ddt-digits",
    sharing_fashion: "sharing-ddt-fashion",
    foreign: "foreign_caching",
    economy: "plan_check",
    style: "style_transfer",
    text: "text_to_image",
    claims: "rae_noise",
    reliability: "kill_resume",
    faults: "faults",
    scale: "scaling",
    studio: "studio",
    comparison: "ddt_vs_dit",
    comparison_fashion: "ddt_vs_dit_fashion",
}
"""part of the README -> the result without which it is left out"""


def figures() -> str:
    there = [part for part, name in PARTS.items() if (RESULTS / f"{name}.json").is_file()]
    return "\n\n".join("\n".join(part()) for part in there)


def render(text: str) -> str:
    """The README with fresh figures."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"README.md lacks the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{figures()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if options.check:
        sys.exit(fresh != text)
    README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
