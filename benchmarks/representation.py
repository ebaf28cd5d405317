"""REPA, SRA and the dispersive loss against plain flow matching: equal network, data, draws and steps.

    python benchmarks/representation.py --work out/representation   Fashion-MNIST, the shipped recipe: hours
    python benchmarks/representation.py --data emoji --work out/representation   emoji of two styles

Measured on the averaged weights, fixed before the runs: the held-out flow loss on fixed (image, t, noise) triples; the
Frechet distance of EfficientNet-Lite0 features of 1000 guided samples of 20 steps to the training data; the accuracy of
a ridge classifier on the mean token of the aligned block, without a label, at t = 0.1. REPA's target is a stage of the
network that the distance is measured with, which may flatter it there. At last the time of a step, in turn, and what it
allocates. With ``--work`` the runs are kept, and the same command continues them; with ``--records
benchmarks/results/records`` what the published table was made from is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import common
import torch
from common import kept, paired, save, without_root
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import untwine
from untwine.contracts import Condition
from untwine.data.base import Dataset
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import LinearPath
from untwine.evaluation.probe import ridge_accuracy
from untwine.evaluation.protocols import Protocol, find_protocol
from untwine.evaluation.references import Reference, from_dataset
from untwine.evaluation.report import evaluate
from untwine.training.metering import read_log
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer

RECIPES = {"fashion": "ddt-fashion", "emoji": "ddt-emoji", "digits": "ddt-digits"}
TERMS = ("plain", "repa", "sra", "dispersive")
SITE, PROBED_AT = "blocks.3", 0.1


def terms(name: str) -> list[dict[str, Any]]:
    """The terms of a shipped recipe; they fit all data."""
    return [] if name == "plain" else Recipe.load(f"ddt-fashion-{name}").to_dict()["objective"]["terms"]


def recipe(name: str, options: argparse.Namespace, seed: int) -> Recipe:
    """The shipped recipe with the terms of ``name``."""
    given = Recipe.load(RECIPES[options.data]).to_dict()
    given |= {"name": f"{name}-{seed}", "seed": seed, "objective": given["objective"] | {"terms": terms(name)}}
    if options.root is not None:
        given["data"] = given["data"] | {"root": options.root}
    found = Recipe.from_dict(given)
    steps = options.steps or found.train.num_steps
    every = max(1, steps // 5)
    parallel = replace(found.train.parallel, compile=True, param_dtype="bfloat16")
    train = replace(found.train, num_steps=steps, validate_every=every, save_every=every, parallel=parallel)
    return replace(found, train=train, sampling=replace(found.sampling, num_inference_steps=20))


def run(name: str, options: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """One run, made if there is no record of it."""
    told, stem = recipe(name, options, seed), f"{options.data}-{name}-{seed}"
    settings = {"recipe": without_root(told), "samples": options.samples, "probe": options.probe}
    file = (options.records or work) / f"representation-{stem}.json"
    return {"seed": seed, **kept(file, settings, lambda: train(told, options, work / stem))}


def train(told: Recipe, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains, judges and probes one run."""
    trainer = Trainer(told, folder)
    trainer.fit()
    lines = read_log(folder / "log.jsonl", "validation")
    curve = [{"step": line["step"], **{key: line[key] for key in parts(line)}} for line in lines]
    fd, accuracy = distance(trainer, folder, options), probe(trainer, folder, options.probe)
    return {"validation_loss": lines[-1]["flow"], "fd": fd, "probe": accuracy, "curve": curve}


def parts(line: dict[str, Any]) -> list[str]:
    return [key for key in ("flow", "alignment", "sra", "dispersive") if key in line]


def distance(trainer: Trainer, folder: Path, options: argparse.Namespace) -> float:
    """FD-EffLite0 of samples to the training pictures."""
    samples = untwine.sample(str(folder), count=options.samples, seed=0, batch_size=100)
    reference = Reference(options.data, lambda size: from_dataset(trainer.training_set, options.data))
    found = evaluate(samples.images, reference, protocol_of(options.samples), cache=folder.parent / "references").values
    return found["metrics"]["fd"]


def protocol_of(count: int) -> Protocol:
    """The Frechet distance alone, of so many samples."""
    return replace(find_protocol("fd-efflite0-1k", num_samples=count), metrics=("fd",))


def probe(trainer: Trainer, folder: Path, count: int) -> float:
    """Accuracy on held-out samples of a ridge classifier of the block's mean token."""
    model: Any = untwine.load(str(folder)).model
    (x, y), (held_x, held_y) = (
        pooled(model, trainer, part, count) for part in (trainer.training_set, trainer.held_out)
    )  # fmt: skip
    return ridge_accuracy(x, y, held_x, held_y)


@torch.no_grad()
def pooled(model: Any, trainer: Trainer, part: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """Mean tokens of the first samples in a fixed random order, and their labels."""
    assert part.labels is not None
    order, draws, found = Draws(0).permutation("probe", len(part), 0)[:count], Draws(1), []
    for start in range(0, len(order), 100):
        index = order[start : start + 100]
        x0 = trainer.codec.encode(torch.stack([part.read(int(k)) for k in index])).latents
        noise, t = draws.normal("probe", x0.shape[1:], index.tolist()), torch.full((len(index),), PROBED_AT)
        null = model.null(Condition(labels=torch.zeros(len(index), dtype=torch.int64)))
        output = model(LinearPath().interpolate(x0, noise, t), t, null, features=(SITE,))
        found.append(output.features[SITE].mean(1))
    return torch.cat(found), torch.from_numpy(part.labels[order])


def training_step(told: Recipe, folder: Path) -> Callable[[], None]:
    """One optimizer step of a fresh run on a fixed batch whose features are known."""
    trainer = Trainer(told, folder)
    (batch,) = next(iter(trainer._loader(0, 1, 1)))

    def step() -> None:
        trainer.networks.zero_grad()
        trainer._loss(batch, "model").total.backward()
        trainer.networks.update("model", 0)

    return step


def step_mib(step: Callable[[], None]) -> float:
    """MiB that a step allocates at most at one time, beside what it found."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events: Any = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=RECIPES, default="fashion")
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=TERMS)
    parser.add_argument("--steps", type=int, help="default: the shipped recipe's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--probe", type=int, default=5000, help="samples that the classifier learns from, at most")
    parser.add_argument("--root", help="folder of the data, where they are not in their usual place")
    parser.add_argument("--work", type=Path, help="keep the runs here, and continue them")
    parser.add_argument("--records", type=Path, help="results of finished runs, read and kept here; default: as --work")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    options = parser.parse_args()
    common.RESULTS = options.out or common.RESULTS
    with tempfile.TemporaryDirectory(prefix="untwine-") as temporary:
        work = options.work or Path(temporary)
        runs = {name: [run(name, options, seed, work) for seed in range(options.seeds)] for name in options.terms}
        steps = {name: training_step(recipe(name, options, 0), Path(temporary) / f"timing-{name}") for name in TERMS}
        seconds = paired(steps, repeats=9, warmup=2)
    keys = ("validation_loss", "fd", "probe")
    save(
        f"representation_{options.data}",
        {
            "recipe": RECIPES[options.data],
            "terms": {name: terms(name) for name in options.terms},
            "probed": {"site": SITE, "t": PROBED_AT, "samples": options.probe},
            "steps": options.steps,
            "samples": options.samples,
            "means": {n: {key: statistics.mean(run[key] for run in rs) for key in keys} for n, rs in runs.items()},
            "step_ms": {name: {k: 1000 * v for k, v in s.items() if k != "repeats"} for name, s in seconds.items()},
            "step_mib": {name: step_mib(step) for name, step in steps.items()},
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
