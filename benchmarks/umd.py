"""UMD against DiT's objective and MAE alone: equal network, data, draws and steps.

    python benchmarks/umd.py --work out/umd                   digits
    python benchmarks/umd.py --data fashion --work out/umd    Fashion-MNIST

Each network is trained without labels by its objective, then tuned by the same one for generation by class, as UMD's
authors do it: every patch visible, one sample in 20 clean and hidden. Fixed before the runs, on averaged weights: the
accuracy of a ridge classifier on the representation after the first stage, of clean pictures (for DiT, which has seen
none, of noised ones at t = 0.05; of clean ones beside it); after the second the held-out error of the noise, and the
Frechet distance of EfficientNet-Lite0 features of 1000 guided samples to the training data. With ``--work`` the runs
are kept, and the same command continues them; with ``--records benchmarks/results/records`` what the published table
was made from is not run again. The same classifier on the pixels is reported as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from common import kept, paired, save, without_root
from representation import distance, step_mib, training_step
from torch import Tensor

import untwine
from untwine.data.base import Dataset
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import Path as NoisePath
from untwine.evaluation.probe import ridge_accuracy
from untwine.training.metering import read_log
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer

RECIPE, GUIDANCE = "umd-digits", 1.5
DATA: dict[str, dict[str, Any]] = {
    "digits": {"steps": 3000, "tune_steps": 1000},
    "fashion": {
        "data": {"resolution": 32},
        "model": {"hidden_size": 128, "depth": 6, "patch_size": 4, "num_positions": 64},
        "train": {"batch_size": 64, "validation": 1000},
        "steps": 6000,
        "tune_steps": 2000,
    },
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "umd": {"clean_ratio": 0.5, "mask_ratio": 0.375, "clean_mask_ratio": 0.75},
    "dit": {"clean_ratio": 0.0, "mask_ratio": 0.0},
    "mae": {"clean_ratio": 1.0, "clean_mask_ratio": 0.75},
}
TUNED = {"conditional": True, "clean_ratio": 0.05, "mask_ratio": 0.0, "clean_mask_ratio": 0.75}
PROBED_AT = {"umd": (0.0,), "mae": (0.0,), "dit": (0.05, 0.0)}
"""the first is the one that counts"""
KEYS = ("probe", "noise_error", "fd")


def recipe(name: str, options: argparse.Namespace, seed: int, *, tune: bool) -> Recipe:
    """The shipped recipe under the objective of ``name``, or tuned for generation."""
    given, chosen = Recipe.load(RECIPE).to_dict(), DATA[options.data]
    given |= {"name": f"{name}-{seed}{'-tuned' if tune else ''}", "seed": seed}
    given["data"] = {"kind": options.data} | ({} if options.root is None else {"root": options.root})
    for part in ("data", "model", "train"):
        given[part] |= chosen.get(part, {})
    given["objective"] |= TUNED if tune else OBJECTIVES[name]
    steps = (options.tune_steps or chosen["tune_steps"]) if tune else (options.steps or chosen["steps"])
    every = max(1, steps // 4)
    fast = {"compile": True, "param_dtype": "bfloat16"}
    given["train"] |= {"num_steps": steps, "validate_every": every, "save_every": every, "parallel": fast}
    given["schedule"] |= {"warmup_steps": steps // 20}
    given["sampling"] |= {"guidance_scale": GUIDANCE, "num_inference_steps": options.sampling_steps}
    if tune:
        given["optimizer"] |= {"weight_decay": 0.0, "betas": [0.9, 0.999], "lr": given["optimizer"]["lr"] / 2}
    return Recipe.from_dict(given)


def run(name: str, options: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """One seed of an objective, made if there is no record of it."""
    stages = [recipe(name, options, seed, tune=tune) for tune in (False, True)]
    settings = {"recipes": list(map(without_root, stages)), "samples": options.samples, "probe": options.probe}
    file = (options.records or work) / f"umd-{options.data}-{name}-{seed}.json"
    return {"seed": seed, **kept(file, settings, lambda: train(name, stages, options, work))}


def train(name: str, stages: list[Recipe], options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Trains both stages, and judges them."""
    folders = [work / f"{options.data}-{stage.name}" for stage in stages]
    started = time.perf_counter()
    first = Trainer(stages[0], folders[0])
    first.fit()
    second = Trainer(stages[1], folders[1], init=folders[0])
    second.fit()
    seconds = time.perf_counter() - started
    probes = {str(t): probe(first, folders[0], t, options.probe) for t in PROBED_AT[name]}
    return {
        "noise_error": read_log(folders[1] / "log.jsonl", "validation")[-1]["noise"],
        "probe": probes[str(PROBED_AT[name][0])],
        "probes": probes,
        "pixels": probe(first, folders[0], None, options.probe),
        "fd": distance(second, folders[1], options),
        "seconds": seconds,
    }


def probe(trainer: Trainer, folder: Path, t: float | None, count: int) -> float:
    """Accuracy on held-out samples of a ridge classifier of the representation; without a time, of the pixels."""
    pipe: Any = untwine.load(str(folder))
    parts = (represented(pipe, trainer, part, t, count) for part in (trainer.training_set, trainer.held_out))
    (x, y), (held_x, held_y) = parts
    return ridge_accuracy(x, y, held_x, held_y)


@torch.no_grad()
def represented(pipe: Any, trainer: Trainer, part: Dataset, t: float | None, count: int) -> tuple[Tensor, Tensor]:
    """Representations (or pixels) of the first samples in a fixed random order, and their labels."""
    assert part.labels is not None
    path: NoisePath = pipe.path
    order, draws, found = Draws(0).permutation("probe", len(part), 0)[:count], Draws(1), []
    for start in range(0, len(order), 100):
        index = order[start : start + 100]
        x0 = trainer.codec.encode(torch.stack([part.read(int(k)) for k in index])).latents
        if t is None:
            found.append(x0.flatten(1))
            continue
        time_of = torch.full((len(index),), t)
        x = x0 if t == 0 else path.interpolate(x0, draws.normal("probe", x0.shape[1:], index.tolist()), time_of)
        found.append(pipe.model.represent(x, time_of))
    return torch.cat(found), torch.from_numpy(part.labels[order])


def costs(options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Milliseconds and MiB of a step of each objective and of tuning, in turn; says how long the runs will take."""
    plans = {name: recipe(name, options, 0, tune=False) for name in OBJECTIVES}
    plans["tuning"] = recipe("umd", options, 0, tune=True)
    steps = {name: training_step(plan, work / f"timing-{name}") for name, plan in plans.items()}
    seconds = {name: found["median"] for name, found in paired(steps, repeats=9, warmup=2).items()}
    tuning = len(OBJECTIVES) * seconds["tuning"] * plans["tuning"].train.num_steps
    training = sum(seconds[name] * plans[name].train.num_steps for name in OBJECTIVES)
    minutes = options.seeds * (training + tuning) / 60
    print(f"expected: {minutes:.0f} minutes of training on this machine, sampling and judging on top", flush=True)
    return {name: {"ms": 1000 * seconds[name], "mib": step_mib(step)} for name, step in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--steps", type=int, help="of the first stage; default: 3000 for digits, 6000 for fashion")
    parser.add_argument("--tune-steps", type=int, help="of the second stage; default: a third of that")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sampling-steps", type=int, default=125)
    parser.add_argument("--probe", type=int, default=5000, help="samples that the classifier learns from, at most")
    parser.add_argument("--root", help="folder of the data, where they are not in their usual place")
    parser.add_argument("--work", type=Path, help="keep the runs here, and continue them")
    parser.add_argument("--records", type=Path, help="results of finished runs, read and kept here; default: as --work")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    options = parser.parse_args()
    common.RESULTS = options.out or common.RESULTS
    with tempfile.TemporaryDirectory(prefix="untwine-") as temporary:
        work = options.work or Path(temporary)
        steps = costs(options, Path(temporary))
        runs = {name: [run(name, options, seed, work) for seed in range(options.seeds)] for name in OBJECTIVES}
    save(
        f"umd_{options.data}",
        {
            "recipe": RECIPE,
            "objectives": OBJECTIVES,
            "tuned": TUNED,
            "probed": {"t": PROBED_AT, "samples": options.probe},
            "steps": [
                options.steps or DATA[options.data]["steps"],
                options.tune_steps or DATA[options.data]["tune_steps"],
            ],
            "samples": options.samples,
            "guidance_scale": GUIDANCE,
            "costs": steps,
            "means": {n: {key: statistics.mean(run[key] for run in rs) for key in KEYS} for n, rs in runs.items()},
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
