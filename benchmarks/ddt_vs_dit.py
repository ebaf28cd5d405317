"""DDT against the improved DiT, and other backbones: equal blocks, width, data, draws and steps.

    python benchmarks/ddt_vs_dit.py                                     digits, 6 blocks of width 48: minutes
    python benchmarks/ddt_vs_dit.py --data fashion --work out/fashion   Fashion-MNIST, 8 blocks of width 128: hours
    python benchmarks/ddt_vs_dit.py --data fashion --work out/fashion --backbones ddt improved_dit sit ddt_head dit
    python benchmarks/ddt_vs_dit.py --data emoji --root data/emoji --seeds 1 --steps 2000 --backbones ddt sit ...

All see the same samples and noise and, but for ``dit``, the same times on the linear path; ``dit`` is the published one
with its own objective, noise and its variance on a chain of 1000 levels: its held-out loss is that of its final weights
read as a predictor of velocities, see ``OnLinearPath``, and its curve is left out of the picture.

Compared is the held-out loss of the averaged weights on fixed (image, t, noise) triples, at every validation, against
steps, training FLOPs and seconds: the seconds are those of a step timed in turn after the runs, on a machine that does
nothing else. Beside it the Frechet distance of EfficientNet-Lite0 features to the training data, of 1000 samples of 20
steps (Euler's; DDIM's for ``dit``) at the end and, on digits, of 300 five times a run. With ``--work`` the runs are
kept, and the same command continues them; with ``--records benchmarks/results/records`` what the published table was
made from is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, kept, paired, save, without_root
from torch import Tensor, nn

import untwine
from untwine.contracts import Condition, Output
from untwine.diffusion.paths import DiscretePath, LinearPath
from untwine.evaluation.references import open_reference
from untwine.evaluation.report import evaluate
from untwine.plotting import figure
from untwine.training.metering import read_log
from untwine.training.objectives.flow_matching import FlowMatching
from untwine.training.recipe import Recipe
from untwine.training.speed import TRAINING
from untwine.training.trainer import Trainer
from untwine.training.validation import Validation

DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "data": {"kind": "digits"},
        **{"width": 48, "depth": 6, "encoder": 4, "head": 72, "patch": 2},
        **{"held_out": 360, "batch": 64, "parallel": {}, "judged": 300},
    },
    "fashion": {
        "data": {"kind": "fashion"},
        **{"width": 128, "depth": 8, "encoder": 6, "head": 192, "patch": 4},
        **{"held_out": 1000, "batch": 32, "parallel": {"compile": True, "param_dtype": "bfloat16"}, "judged": 0},
    },
    "emoji": {
        "data": {"kind": "emoji", "resolution": 32},
        **{"width": 128, "depth": 8, "encoder": 6, "head": 192, "patch": 4},
        **{"held_out": 0.1, "batch": 32, "parallel": {"compile": True, "param_dtype": "bfloat16"}, "judged": 0},
    },
}
PROTOCOL = "fd-efflite0-1k"
STEPS = {"digits": 700, "fashion": 5000, "emoji": 5000}
OWN = {
    "dit": {
        "objective": {
            "kind": "flow_matching",
            "path": "discrete",
            "time": "uniform",
            "terms": [{"kind": "variational_bound"}],
        },
        "sampling": {"num_inference_steps": 20, "guidance_scale": 1.0, "solver": "ddim"},
    }
}
"""of a recipe, where it is not as the others'"""
BACKBONES = ("ddt", "improved_dit", "sit", "ddt_head", "dit")
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def model(name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a backbone; the head of ``ddt_head`` is half as wide again as its encoder."""
    shape = {"hidden_size": plan["width"], "depth": plan["depth"], "num_heads": 4, "patch_size": plan["patch"]}
    split = {"encoder_depth": plan["encoder"]} if name in ("ddt", "ddt_head") else {}
    head = {"decoder_hidden_size": plan["head"], "decoder_num_heads": 4} if name == "ddt_head" else {}
    return {"kind": name, **shape, **split, **head}


def recipe(name: str, plan: dict[str, Any], seed: int, steps: int) -> Recipe:
    return Recipe.from_dict(
        {
            "name": f"{name}-{seed}",
            "seed": seed,
            "data": plan["data"],
            "model": model(name, plan),
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
                "evaluate_every": steps // 5 if plan["judged"] else None,
                "evaluation": {"protocol": PROTOCOL, "num_samples": plan["judged"] or None, "batch_size": 100},
            },
            "sampling": {"num_inference_steps": 20, "guidance_scale": 1.0},
            **OWN.get(name, {}),
        }
    )


def train(told: Recipe, plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains and judges one run."""
    name = told.model.kind
    trainer = Trainer(told, folder)
    trainer.fit()
    network: Any = trainer.networks.model
    step_flops = TRAINING * plan["batch"] * network.flops(trainer.latent_shape)
    training, validation = (read_log(folder / "log.jsonl", kind) for kind in ("train", "validation"))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "step_gflops": step_flops / 1e9,
        "validation_loss": velocity_error(trainer, folder) if name in OWN else validation[-1]["loss"],
        "training_loss": training[-1]["loss"],
        **judged(folder, plan),
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


def result(name: str, plan: dict[str, Any], seed: int, steps: int, work: Path, records: Path) -> dict[str, Any]:
    """Of one run, which is made if there is no record of it."""
    told = recipe(name, plan, seed, steps)
    file = records / f"backbone-{plan['data']['kind']}-{name}-{seed}.json"
    return kept(file, without_root(told), lambda: train(told, plan, work / told.name))


class OnLinearPath(nn.Module):
    """A noise predictor of a chain, asked for the velocities of the linear path at the levels of equal alpha / sigma.

    x0 is clipped to [-1, 1], as in its sampler: unclipped, errors near t = 1 count by ``1 / (1 - t)^2``.
    """

    predicts = "velocity"

    def __init__(self, model: Any, chain: DiscretePath) -> None:
        super().__init__()
        self.model, self.chain = model, chain
        self.levels = torch.arange(1, chain.num_timesteps + 1) / chain.num_timesteps
        c = chain.at(self.levels)
        self.between = (c.sigma / c.alpha).log().unfold(0, 2, 1).mean(1)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, **_: Any) -> Output:
        c = LinearPath().coefficients(t, x)
        level = self.levels[torch.searchsorted(self.between, (t / (1 - t)).log())]
        x = x / (c.alpha.square() + c.sigma.square()).sqrt()
        noise = self.model(x, level, condition).sample.float()
        return Output(noise - self.chain.noise_to_x0(noise, x, level).clamp(-1, 1))


def velocity_error(trainer: Trainer, folder: Path) -> float:
    """Of the averaged weights of a finished run of ``dit``, on the triples of the others."""
    chain: Any = trainer.objective.path
    model = untwine.load(str(folder)).model
    validation = Validation(
        trainer.held_out, trainer.codec, seed=trainer.recipe.seed, batch_size=256, processes=trainer.processes
    )
    measured = validation.measure(
        {"model": OnLinearPath(model, chain)}, FlowMatching(), step=0, precision=trainer.networks.forward_precision
    )
    return measured["loss"]


def judged(folder: Path, plan: dict[str, Any]) -> dict[str, float]:
    """Distance of a finished run's samples."""
    samples = untwine.sample(str(folder), count=1000, seed=0, batch_size=100)
    options = ",".join(f"{key}={value}" for key, value in plan["data"].items() if key != "kind")
    reference = open_reference(":".join(filter(None, (plan["data"]["kind"], options))))
    report = evaluate(samples.images, reference, PROTOCOL, cache=folder.parent / "references").values
    return {"fd": report["metrics"]["fd"], "kid": report["metrics"]["kid"], "floor": report["floor"]["fd"]}


def draw(runs: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Held-out loss over steps, work and time, and distances over steps: each seed, and the mean of the seeds."""
    panels = [
        ("curve", "step", "validation_loss", "optimizer step", "held-out loss"),
        ("curve", "gflops", "validation_loss", "training TFLOP", "held-out loss"),
        ("curve", "seconds", "validation_loss", "training seconds", "held-out loss"),
        ("distances", "step", "fd", "optimizer step", "Frechet distance (efflite0)"),
    ]
    found = runs["ddt"]
    panels = panels if found[0]["distances"] else panels[:3]
    seeds = f", {len(found)} seeds" if len(found) > 1 else ""
    sheet, axes = figure(len(panels), size=(4.2 * len(panels), 4.0))
    for panel, (curve, over, value, along, label) in zip(axes, panels):
        for name, found in runs.items():
            if value == "validation_loss" and name in OWN:
                continue
            color = COLORS[BACKBONES.index(name)]
            lines = [[point[value] for point in run[curve]] for run in found]
            scale = 1e-3 if over == "gflops" else 1
            places = [scale * point[over] for point in found[0][curve]]
            for line in lines:
                panel.plot(places, line, color=color, alpha=0.3, linewidth=1)
            means = [statistics.mean(values) for values in zip(*lines)]
            panel.plot(places, means, color=color, marker="o", markersize=4, label=f"{name}{seeds}")
        panel.set(xlabel=along, ylabel=label, yscale="log")
        for formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            formatter("{x:g}")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=9)
    if len(panels) == 4:
        floor = statistics.mean(point["floor"] for run in runs["ddt"] for point in run["distances"])
        axes[3].axhline(floor, color="grey", linestyle="--", linewidth=1)
        axes[3].annotate(
            "floor: real against real", (0.02, 1.04 * floor), xycoords=("axes fraction", "data"), fontsize=8
        )
    sheet.suptitle(title, fontsize=10)
    sheet.savefig(path, dpi=110)


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
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES[:2])
    parser.add_argument("--steps", type=int, help="default: 700 on digits, 5000 on the others")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, help="where the data lies")
    parser.add_argument("--work", type=Path, help="keep the runs here, and continue them")
    parser.add_argument("--records", type=Path, help="results of finished runs, read and kept here; default: as --work")
    options = parser.parse_args()
    steps, plan = options.steps or STEPS[options.data], DATA[options.data]
    located = {**plan, "data": {**plan["data"], **({"root": str(options.root)} if options.root else {})}}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.backbones}
    with tempfile.TemporaryDirectory(prefix="untwine-") as temporary:
        work = options.work or Path(temporary)
        for seed in range(options.seeds):
            for name, found in runs.items():
                found.append(result(name, located, seed, steps, work, options.records or work))
        steppers = {name: training_step(name, located, work / "timing") for name in runs}
        seconds = paired(steppers, repeats=15, warmup=3)
    with_seconds(runs, seconds)
    means = {
        name: {key: statistics.mean(run[key] for run in found) for key in ("validation_loss", "training_loss", "fd")}
        for name, found in runs.items()
    }
    settings = {**plan, "steps": steps, "seeds": options.seeds}
    values = {"settings": settings, "runs": runs, "means": means, "step_seconds": seconds}
    names = "" if len(runs) == 2 else "-backbones"
    where = ROOT / "docs" / "images" / f"ddt-vs-dit-{options.data}{names}.png"
    draw(runs, f"{plan['depth']} blocks of width {plan['width']}, {options.data}", where)
    save(f"ddt_vs_dit{names.replace('-', '_')}{'' if options.data == 'digits' else '_' + options.data}", values)


if __name__ == "__main__":
    main()
