"""Trains a small DDT on handwritten digits, draws 500 new ones and judges them.

    python benchmarks/demo.py --out out/demo

Two CPU cores: about three minutes. Leaves grid.png, loss.png, samples.npz and report.json in the folder. Run again, it
draws and judges from the finished run.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from common import save
from digit_checks import judge

import untwine
from untwine.cli.options import log_to_console, show
from untwine.pipelines.writing import prepare_folder, save_samples
from untwine.training.metering import read_log
from untwine.training.recipe import Recipe


def plot_loss(folder: Path, target: Path) -> None:
    """Training and validation loss over steps, and the validation loss per time bin."""
    training, validation = (read_log(folder / "log.jsonl", kind) for kind in ("train", "validation"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([line["step"] for line in training], [line["loss"] for line in training], label="training, raw weights")
    left.plot(
        [line["step"] for line in validation],
        [line["loss"] for line in validation],
        "o-",
        label="held out, averaged weights, uniform t",
    )
    left.set(xlabel="optimizer step", ylabel="flow loss", yscale="log")
    left.legend(frameon=False)
    bins = validation[-1]["loss_per_time_bin"]
    right.bar([(k + 0.5) / len(bins) for k in range(len(bins))], bins, width=0.9 / len(bins))
    right.set(xlabel="t (0 = data, 1 = noise)", ylabel="held-out loss after the last step")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the recipe's")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/demo.json")
    options = parser.parse_args()
    log_to_console()
    started = time.perf_counter()
    out = prepare_folder(options.out)
    recipe = Recipe.load("ddt-digits")
    if options.steps:
        recipe = replace(recipe, train=replace(recipe.train, num_steps=options.steps))
    trainer = untwine.Trainer(recipe, out / "run")
    trainer.fit()
    trained = time.perf_counter() - started
    samples = untwine.sample(out / "run", count=options.count, seed=1, batch_size=250)
    checks = judge(samples.images, samples.labels, trainer.training_set, trainer.held_out)
    samples.report.update(checks=checks, training_seconds=round(trained, 1), cores=torch.get_num_threads())
    save_samples(samples, out, columns=20, pictures=False)
    plot_loss(out / "run", out / "loss.png")
    samples.report["total_seconds"] = round(time.perf_counter() - started, 1)
    (out / "report.json").write_text(json.dumps(samples.report, indent=2) + "\n")
    if options.record:
        figures = {key: samples.report[key] for key in ("checks", "training_seconds", "seconds", "total_seconds")}
        save("demo", {"steps": recipe.train.num_steps, "count": options.count, **figures})
    show(
        "untwine demo",
        {
            "trained": f"{trained:.0f} s, {recipe.train.num_steps} steps",
            "drawn": f"{options.count} digits in {samples.report['seconds']:.1f} s",
            "recognised": f"{checks['recognised']:.1%}, by an SVM on real digits ({checks['classifier_accuracy']:.1%})",
            "diversity": f"{checks['diversity']:.2f} of real digits",
            "novelty": f"{checks['novelty']:.2f} of held-out digits",
            "look at": f"{out / 'grid.png'}, {out / 'loss.png'}",
        },
    )


if __name__ == "__main__":
    main()
