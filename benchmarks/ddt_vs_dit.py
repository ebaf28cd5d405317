"""DDT against the improved DiT on handwritten digits: equal blocks, width, data, draws and steps.

    python benchmarks/ddt_vs_dit.py --steps 700 --seeds 3

Both have 6 blocks of width 48 (DDT: 4 encoder, 2 decoder) and see the same noise and times. The number compared is the
held-out loss of the averaged weights on fixed (image, t, noise) triples, and the training loss of the last 100 steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import save

from untwine.training.metering import read_log
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer

MODELS: dict[str, dict[str, Any]] = {
    "ddt": {"kind": "ddt", "hidden_size": 48, "depth": 6, "encoder_depth": 4, "num_heads": 4},
    "improved_dit": {"kind": "improved_dit", "hidden_size": 48, "depth": 6, "num_heads": 4},
}


def train(model: dict[str, Any], seed: int, steps: int, folder: Path) -> dict[str, float]:
    recipe = Recipe.from_dict(
        {
            "name": "ddt-vs-dit",
            "seed": seed,
            "data": {"kind": "digits"},
            "model": model,
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "ema": [{"kind": "constant", "decay": 0.995, "warmup": True}],
            "train": {
                "num_steps": steps,
                "batch_size": 64,
                "validation": 360,
                "log_every": 100,
                "validate_every": steps,
                "save_every": steps,
            },
        }
    )
    trainer = Trainer(recipe, folder)
    result = trainer.fit()
    return {
        "parameters": sum(p.numel() for p in trainer.networks.model.parameters()),
        "validation_loss": result.metrics["validation_loss"],
        "training_loss": read_log(folder / "log.jsonl", "train")[-1]["loss"],
        "seconds": result.metrics["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    with tempfile.TemporaryDirectory(prefix="untwine-") as work:
        for seed in range(options.seeds):
            for name, model in MODELS.items():
                runs[name].append(train(model, seed, options.steps, Path(work) / f"{name}-{seed}"))
    means = {
        name: {key: statistics.mean(run[key] for run in found) for key in ("validation_loss", "training_loss")}
        for name, found in runs.items()
    }
    ratio = {key: means["ddt"][key] / means["improved_dit"][key] for key in means["ddt"]}
    save("ddt_vs_dit", {"settings": vars(options), "runs": runs, "means": means, "ddt_over_dit": ratio})


if __name__ == "__main__":
    main()
