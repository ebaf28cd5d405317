"""Backbones and objectives compared."""

from __future__ import annotations

from typing import Any

from tables.results import result_of, source

_BACKBONES = {
    "ddt": "DDT",
    "improved_dit": "improved DiT",
    "sit": "SiT",
    "ddt_head": "DiT-DH (wide head)",
    "dit": "DiT, its own objective",
}


def comparison() -> list[str]:
    return _compared("ddt_vs_dit", "python benchmarks/ddt_vs_dit.py")


def comparison_fashion() -> list[str]:
    return _compared("ddt_vs_dit_fashion", "python benchmarks/ddt_vs_dit.py --data fashion")


def backbones_fashion() -> list[str]:
    return _compared("ddt_vs_dit_backbones_fashion", "python benchmarks/ddt_vs_dit.py --data fashion --backbones ...")


def backbones_emoji() -> list[str]:
    return _compared("ddt_vs_dit_backbones_emoji", "python benchmarks/ddt_vs_dit.py --data emoji --backbones ...")


def _compared(name: str, command: str) -> list[str]:
    """A row for every backbone; the published DiT's losses are of another objective, and left out."""
    result = result_of(name)
    settings, means, runs = result["settings"], result["means"], result["runs"]
    data, seeds = settings["data"]["kind"], settings["seeds"]
    losses = {
        key: ("", "") if key == "dit" else (_spread(found, "validation_loss"), f"{means[key]['training_loss']:.4f}")
        for key, found in runs.items()
    }
    picture = f"ddt-vs-dit-{data}{'' if len(runs) == 2 else '-backbones'}.png"
    return [
        f"| {settings['depth']} blocks of width {settings['width']} on {data}, {settings['steps']} steps, {seeds} "
        f"seed{'s' if seeds > 1 else ''} | parameters | held-out loss | training loss | FD-EffLite0 (floor) | GFLOP a "
        "step | ms a step |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {_BACKBONES[key]} | {found[0]['parameters']:,} | {' | '.join(losses[key])} | {_last_distance(found)} | "
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


def _spread(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    mean = f"{sum(values) / len(values):.4f}"
    return f"{mean} ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else mean


def _last_distance(runs: list[dict[str, Any]]) -> str:
    last = [run["distances"][-1] if run["distances"] else run for run in runs]
    mean, floor = (sum(point[key] for point in last) / len(last) for key in ("fd", "floor"))
    return f"{mean:.1f} ({floor:.1f})"


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
