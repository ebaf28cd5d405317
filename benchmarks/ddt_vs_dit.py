"""DDT against the improved DiT: equal blocks, width, data, draws and steps.

    python benchmarks/ddt_vs_dit.py                                     digits, 6 blocks of width 48: minutes
    python benchmarks/ddt_vs_dit.py --data fashion --work out/fashion   Fashion-MNIST, 8 blocks of width 128: hours

Both see the same samples, noise and times. Compared is the held-out loss of the averaged weights on fixed
(image, t, noise) triples, at every validation, against steps, training FLOPs and seconds: the seconds are those of a
step timed in turn after the runs, on a machine that does nothing else. Beside it the Frechet distance of
EfficientNet-Lite0 features of ``--judged`` samples of each average to the training data, five times a run. With
``--work`` the runs are kept, and the same command continues them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, paired, save

from untwine.contracts import Condition
from untwine.plotting import figure
from untwine.training.metering import read_log
from untwine.training.recipe import Recipe
from untwine.training.speed import TRAINING
from untwine.training.trainer import Trainer

DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "data": {"kind": "digits"},
        **{"width": 48, "depth": 6, "encoder": 4, "patch": 2},
        **{"held_out": 360, "batch": 64, "parallel": {}},
    },
    "fashion": {
        "data": {"kind": "fashion"},
        **{"width": 128, "depth": 8, "encoder": 6, "patch": 4},
        **{"held_out": 1000, "batch": 32, "parallel": {"compile": True, "param_dtype": "bfloat16"}},
    },
}
STEPS = {"digits": 700, "fashion": 5000}


def recipe(name: str, plan: dict[str, Any], seed: int, steps: int, judged: int = 0) -> Recipe:
    split = {"encoder_depth": plan["encoder"]} if name == "ddt" else {}
    shape = {"hidden_size": plan["width"], "depth": plan["depth"], "num_heads": 4, "patch_size": plan["patch"]}
    return Recipe.from_dict(
        {
            "name": f"{name}-{seed}",
            "seed": seed,
            "data": plan["data"],
            "model": {"kind": name, **shape, **split},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "ema": [{"kind": "constant", "decay": 0.995, "warmup": True}],
            "train": {
                "num_steps": steps,
                "batch_size": plan["batch"],
                "parallel": plan["parallel"],
                "validation": plan["held_out"],
                "log_every": 100,
                "validate_every": max(100, steps // 10),
                "save_every": max(100, steps // 20),
                "evaluate_every": steps // 5 if judged else None,
                "evaluation": {"protocol": "fd-efflite0-1k", "num_samples": judged or None, "batch_size": 100},
            },
            "sampling": {"num_inference_steps": 20, "guidance_scale": 1.0},
        }
    )


def train(name: str, plan: dict[str, Any], seed: int, steps: int, folder: Path, judged: int) -> dict[str, Any]:
    trainer = Trainer(recipe(name, plan, seed, steps, judged), folder)
    trainer.fit()
    model: Any = trainer.networks.model
    step_flops = TRAINING * plan["batch"] * model.flops(trainer.latent_shape)
    training, validation = (read_log(folder / "log.jsonl", kind) for kind in ("train", "validation"))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_loss": validation[-1]["loss"],
        "training_loss": training[-1]["loss"],
        "curve": [
            {
                "step": line["step"],
                "gflops": round(line["step"] * step_flops / 1e9),
                "validation_loss": line["loss"],
            }
            for line in validation
        ],
        "distances": [
            {"step": line["step"], "fd": line["fd"], "floor": line["floor_fd"], "kid": line["kid"]}
            for line in read_log(folder / "log.jsonl", "evaluation")
        ],
    }


def draw(runs: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Held-out loss and distance over steps: each seed, and the mean of the seeds."""
    judged = any(run["distances"] for found in runs.values() for run in found)
    sheet, axes = figure(2 if judged else 1, size=(10.0 if judged else 5.4, 4.2))
    panels = [("curve", "validation_loss", "held-out loss"), ("distances", "fd", "Frechet distance (efflite0)")]
    for panel, (curve, value, label) in zip(axes, panels):
        for (name, found), color in zip(runs.items(), ("tab:blue", "tab:orange")):
            lines = [[point[value] for point in run[curve]] for run in found]
            steps = [point["step"] for point in found[0][curve]]
            for line in lines:
                panel.plot(steps, line, color=color, alpha=0.3, linewidth=1)
            means = [statistics.mean(values) for values in zip(*lines)]
            panel.plot(steps, means, color=color, marker="o", markersize=4, label=f"{name}, mean of {len(found)} seeds")
        panel.set(xlabel="optimizer step", ylabel=label, yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=9)
    if judged:
        floor = statistics.mean(point["floor"] for run in runs["ddt"] for point in run["distances"])
        axes[1].axhline(floor, color="grey", linestyle="--", linewidth=1)
        axes[1].annotate(
            "floor: real against real", (0.02, 1.04 * floor), xycoords=("axes fraction", "data"), fontsize=8
        )
    sheet.suptitle(title, fontsize=10)
    sheet.savefig(path, dpi=120)


def training_step(name: str, plan: dict[str, Any], folder: Path) -> Callable[[], None]:
    """Forward, backward and update of a fresh network on a fixed batch."""
    trainer = Trainer(recipe(name, plan, 0, 1), folder)
    networks, batch = trainer.networks, plan["batch"]
    x, t, labels = torch.randn(batch, *trainer.latent_shape), torch.rand(batch), torch.arange(batch) % 10

    def step() -> None:
        networks.zero_grad()
        with networks.forward_precision():
            prediction = networks.model(x, t, Condition(labels=labels)).sample
        (prediction.float() - x).square().mean().backward()
        networks.update("model", 0)

    return step


def with_seconds(runs: dict[str, list[dict[str, Any]]], seconds: dict[str, dict[str, float]]) -> None:
    """Adds to every point of every curve how long its steps take by the interleaved timing."""
    for name, found in runs.items():
        for point in (point for run in found for point in run["curve"]):
            point["seconds"] = round(point["step"] * seconds[name]["median"], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(DATA), default="digits")
    parser.add_argument("--steps", type=int, help="default: 700 on digits, 5000 on Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judged", type=int, default=300, help="samples whose distance is taken; 0 = none")
    parser.add_argument("--work", type=Path, help="keep the runs here, and continue them")
    options = parser.parse_args()
    steps, plan = options.steps or STEPS[options.data], DATA[options.data]
    runs: dict[str, list[dict[str, Any]]] = {"ddt": [], "improved_dit": []}
    with tempfile.TemporaryDirectory(prefix="untwine-") as temporary:
        work = options.work or Path(temporary)
        for seed in range(options.seeds):
            for name, found in runs.items():
                found.append(train(name, plan, seed, steps, work / f"{name}-{seed}", options.judged))
        seconds = paired({name: training_step(name, plan, work / "timing") for name in runs}, repeats=15, warmup=3)
    with_seconds(runs, seconds)
    means = {
        name: {key: statistics.mean(run[key] for run in found) for key in ("validation_loss", "training_loss")}
        for name, found in runs.items()
    }
    ratio = {key: means["ddt"][key] / means["improved_dit"][key] for key in means["ddt"]}
    settings = {**plan, "steps": steps, "seeds": options.seeds}
    result = {"settings": settings, "runs": runs, "means": means, "ddt_over_dit": ratio, "step_seconds": seconds}
    where = ROOT / "docs" / "images" / f"ddt-vs-dit-{options.data}.png"
    title = f"DDT and improved DiT, {plan['depth']} blocks of width {plan['width']}, {options.data}"
    draw(runs, title, where)
    save("ddt_vs_dit" if options.data == "digits" else f"ddt_vs_dit_{options.data}", result)


if __name__ == "__main__":
    main()
