"""Backbones and objectives compared."""

from __future__ import annotations

from typing import Any

from tables.results import result_of, source

_BACKBONES = {
    "ddt": "DDT",
    "improved_dit": "improved DiT",
    "sit": "SiT",
    "ddt_head": "DiT-DH (wide head)",
    "dit": "DiT, its own objective (loss: as velocities)",
}


def comparison() -> list[str]:
    return _compared("ddt_vs_dit", "python benchmarks/ddt_vs_dit.py")


def backbones_fashion() -> list[str]:
    return _compared("ddt_vs_dit_backbones_fashion", "python benchmarks/ddt_vs_dit.py --data fashion")


def backbones_emoji() -> list[str]:
    command = "python benchmarks/ddt_vs_dit.py --data emoji --root data/emoji --seeds 1 --steps 2000"
    return _compared("ddt_vs_dit_backbones_emoji", command)


def _compared(name: str, command: str) -> list[str]:
    """A row for every backbone; the published DiT's training loss is of another objective, and left out."""
    result = result_of(name)
    settings, means, runs = result["settings"], result["means"], result["runs"]
    data, seeds = settings["data"]["kind"], settings["seeds"]
    if len(runs) > 2:
        command += f" --backbones {' '.join(runs)} --records benchmarks/results/records"
    trained = {key: "" if key == "dit" else f"{mean['training_loss']:.4f}" for key, mean in means.items()}
    picture = f"ddt-vs-dit-{data}{'' if len(runs) == 2 else '-backbones'}.png"
    return [
        f"| {settings['depth']} blocks of width {settings['width']} on {data}, {settings['steps']} steps, {seeds} "
        f"seed{'s' if seeds > 1 else ''} | parameters | held-out loss | training loss | FD-EffLite0 (floor) | GFLOP a "
        "step | ms a step |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {_BACKBONES[key]} | {found[0]['parameters']:,} | {_spread(found, 'validation_loss')} | "
            f"{trained[key]} | {_last_distance(found)} | "
            f"{_step_gflops(found[0]):.1f} | {1000 * result['step_seconds'][key]['median']:.0f} |"
            for key, found in runs.items()
        ),
        "",
        f"![losses and distances of each](docs/images/{picture})",
        "",
        f"Means over seeds, with the lowest and highest loss; every run and its curve is in "
        f"`benchmarks/results/{name}.json`. " + source(result, command),
    ]


def _step_gflops(run: dict[str, Any]) -> float:
    last = run["curve"][-1]
    return last["gflops"] / last["step"]


def _spread(runs: list[dict[str, Any]], key: str, form: str = ".4f", to: str = "-") -> str:
    values = [run[key] for run in runs]
    mean, low, high = (format(value, form) for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low}{to}{high})" if len(values) > 1 else mean


def _last_distance(runs: list[dict[str, Any]]) -> str:
    last = [run["distances"][-1] if run["distances"] else run for run in runs]
    mean, floor = (sum(point[key] for point in last) / len(last) for key in ("fd", "floor"))
    return f"{mean:.1f} ({floor:.1f})"


_TERMS = {"plain": "flow matching alone", "repa": "with REPA", "sra": "with SRA", "dispersive": "with dispersion"}


def aligned_fashion() -> list[str]:
    return _aligned("fashion")


def aligned_emoji() -> list[str]:
    return _aligned("emoji")


def _aligned(data: str) -> list[str]:
    result = result_of(f"representation_{data}")
    seeds, root = len(result["runs"]["plain"]), " --root data/emoji" if data == "emoji" else ""
    command = f"python benchmarks/representation.py --data {data}{root} --steps {result['steps']} --seeds {seeds}"
    return [
        f"| `{result['recipe']}`, {result['steps'] or 'all'} steps, {seeds} seeds | held-out flow loss | FD-EffLite0 | "
        "linear probe of the aligned block | ms a step | MiB it allocates |",
        "|---|---|---|---|---|---|",
        *(_aligned_row(result, name) for name in result["step_ms"]),
        "",
        "Means over seeds, with the lowest and highest. Differences from the flow alone at equal seeds: "
        f"{'; '.join(_beside_plain(result['runs'], name) for name in result['runs'] if name != 'plain')}. "
        + source(result, f"{command} --terms {' '.join(result['runs'])} --records benchmarks/results/records"),
    ]


_KEYS = {"validation_loss": ("loss", ".4f"), "fd": ("FD", ".1f"), "probe": ("probe", ".1%")}


def _beside_plain(runs: dict[str, list[dict[str, Any]]], name: str) -> str:
    """Every measure's differences; held-out samples differ between seeds, and are the same at one."""
    pairs = list(zip(runs[name], runs["plain"]))
    found = [{key: run[key] - plain[key] for key in _KEYS} for run, plain in pairs]
    told = (f"{what} {_spread(found, key, '+' + form, ' to ')}" for key, (what, form) in _KEYS.items())
    return f"{_TERMS[name]} {', '.join(told)}"


def _aligned_row(result: dict[str, Any], name: str) -> str:
    """What a term was only timed for stays empty."""
    runs, took, plain = result["runs"].get(name), result["step_ms"][name], result["step_ms"]["plain"]
    found = [_spread(runs, key, form) if runs else "" for key, (_, form) in _KEYS.items()]
    cost = f"{took['median']:.0f} ({took['median'] / plain['median']:.2f}x) | {result['step_mib'][name]:.0f}"
    return f"| {_TERMS[name]} | {' | '.join(found)} | {cost} |"


_MASKED = {"umd": "UMD", "dit": "DiT's objective", "mae": "MAE alone"}


def masked() -> list[str]:
    result = result_of("umd_digits")
    first, second = result["steps"]
    pixels = sum(run["pixels"] for run in result["runs"]["umd"]) / len(result["runs"]["umd"])
    return [
        f"| `{result['recipe']}`, {first} steps without labels, {len(result['runs']['umd'])} seeds | linear probe | "
        f"error of the noise after {second} more steps for generation | FD-EffLite0 | ms a step | MiB it allocates |",
        "|---|---|---|---|---|---|",
        *(
            f"| {_MASKED[name]} | {_spread(runs, 'probe', '.1%')} | {_spread(runs, 'noise_error')} | "
            f"{_spread(runs, 'fd', '.1f')} | {result['costs'][name]['ms']:.0f} | {result['costs'][name]['mib']:.0f} |"
            for name, runs in result["runs"].items()
        ),
        "",
        f"The same probe of the pixels: {pixels:.1%}. " + source(result, "python benchmarks/umd.py"),
    ]


_SWEPT = {"ddt": "DDT", "dit": "DiT"}


def _parametrized(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(what, its part of the result) of both models under both parametrizations"""
    parametrizations = {"mup": "muP", "standard": "standard parametrization"}
    return [
        (f"{told}, {parametrizations[name]}", result[model][name])
        for model, told in _SWEPT.items()
        for name in parametrizations
    ]


def _pictures(told: str, stem: str) -> list[str]:
    """Both models' pictures, a paragraph each."""
    paragraphs = (f"![{told.format(name)}](docs/images/{stem}-{model}.png)" for model, name in _SWEPT.items())
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def coordinates() -> list[str]:
    """Slopes of activations over the width."""
    result = result_of("mup_coordinates_digits")
    return [
        f"| log-log slope of activations over widths {result['widths'][0]}-{result['widths'][-1]}, digits, "
        f"{result['steps']} steps | layers beyond ±0.1 (asked of muP: none) | largest | layer of the largest |",
        "|---|---|---|---|",
        *(
            f"| {told} | {sum(_steep(row) > 0.1 for row in check['slopes'].values())} of {len(check['slopes'])} | "
            f"{check['largest_slope']:+.2f} | `{_steepest(check['slopes'])}` |"
            for told, check in _parametrized(result)
        ),
        "",
        *_pictures("sizes of every layer of {} over the width", "mup-coordinates-digits"),
        source(result, "python benchmarks/mup.py"),
    ]


def _steepest(slopes: dict[str, list[float | None]]) -> str:
    return max(slopes, key=lambda layer: _steep(slopes[layer]))


def _steep(slopes: list[float | None]) -> float:
    """The largest of the steps; a layer that still puts out zeros has no slope."""
    return max(abs(slope or 0.0) for slope in slopes)


def rates() -> list[str]:
    """The best rate of each width, and by how many places of the grid it moves."""
    result = result_of("mup_transfer_fashion")
    return [
        f"| best learning rate after {result['steps']} steps, Fashion-MNIST, {result['depth']} blocks | "
        f"{' | '.join(f'width {width}' for width in result['widths'])} | largest shift, in factors of 2 | "
        f"loss of width {result['widths'][-1]} at the rate of width {result['widths'][0]}, and at its own |",
        "|---|" + "---|" * (len(result["widths"]) + 2),
        *(
            f"| {told} | {' | '.join(f'{rate:.1e}' for rate in sweep['best'])} | "
            f"{max(map(abs, sweep['shift_in_grid_steps']))} | {_transferred(sweep)} |"
            for told, sweep in _parametrized(result)
        ),
        "",
        *_pictures("losses of {} over the learning rate", "mup-transfer-fashion"),
        source(result, "python benchmarks/mup.py --transfer --data fashion --depth 4"),
    ]


def _transferred(sweep: dict[str, Any]) -> str:
    """Losses of the widest model at the narrowest one's best rate and at its own."""
    losses = dict(zip(sweep["lrs"], sweep["losses"][-1]))
    pair = losses[sweep["best"][0]], losses[sweep["best"][-1]]
    return ", ".join("diverged" if loss is None else f"{loss:.4f}" for loss in pair)


def claims() -> list[str]:
    mean_flow, width, noise = (result_of(name) for name in ("mean_flow", "width_claim", "rae_noise"))
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
            source(result, f"python benchmarks/{result['benchmark']}.py") for result in (mean_flow, width, noise)
        ),
    ]
