"""Whether a decoder trained on noisy latents (RAE, tau 0.8) withstands noise on them better than one that was not.

    python benchmarks/rae_noise.py --root data/emoji --work out/rae-noise

Stage 1 of RAE in the trainer, with L1 alone: a small ViT decoder for the 16 x 16 x 24 map that a frozen
EfficientNet-Lite0 makes of 64 x 64 pictures, trained on emoji of two styles and on crops of two photographs
(scikit-learn's), tau 0.8 against 0, each of two seeds. Judged by the PSNR of held-out emoji, and of crops from a strip
of the photographs that training never sees, decoded from normalised latents plus N(0, s^2) noise, the same for both.
Leaves ``docs/images/rae-noise.png``: pictures above what either decoder makes of them at s = 0.3. One core: about ten
minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, save
from PIL import Image
from torch import Tensor

from untwine.codecs.rae import RAECodec
from untwine.config import Component
from untwine.data.base import Dataset
from untwine.diffusion.draws import Draws
from untwine.training.objectives.reconstruction import export
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer

SIZE, NOISE, TAUS = 64, (0.0, 0.15, 0.3, 0.6), (0.0, 0.8)


def emoji(root: Path) -> tuple[Dataset, Dataset]:
    dataset = Component(Dataset.kinds, "emoji", {"root": str(root), "styles": ["google", "twitter"]}).build()
    return dataset.split(0.1, 0)


def photographs() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Crops on a grid of 16 pixels: left of three quarters of each photograph for training, the rest held out."""
    from sklearn.datasets import load_sample_images

    parts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for image in load_sample_images().images:
        cut = image.shape[1] * 3 // 4
        for part, area, stride in zip(parts, (image[:, :cut], image[:, cut:]), (16, 32)):
            rows, columns = (range(0, n - SIZE + 1, stride) for n in area.shape[:2])
            part += [area[y : y + SIZE, x : x + SIZE] for y in rows for x in columns]
    return parts


def to_levels(dataset: Dataset, count: int) -> list[np.ndarray]:
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    pictures = ((dataset.read(int(i)) + 1) * 127.5 for i in chosen)
    return [p.round().to(torch.uint8).permute(1, 2, 0).numpy() for p in pictures]


def write(folder: Path, pictures: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, levels in enumerate(pictures):
        Image.fromarray(levels).save(folder / f"{i:05d}.png")


def recipe(folder: Path, tau: float, seed: int, steps: int) -> Recipe:
    return Recipe.from_dict(
        {
            "name": f"rae-tau-{tau}-seed-{seed}",
            "seed": seed,
            "data": {"kind": "folder", "root": str(folder), "resolution": SIZE, "layout": "flat"},
            "model": {
                "kind": "rae",
                "representation": {"encoder": {"kind": "efflite0", "side": SIZE}, "sites": ["network._blocks.2"]},
                "hidden_size": 128,
                "depth": 2,
                "num_heads": 4,
                "patch_size": 4,
            },
            "objective": {"kind": "reconstruction", "tau": tau, "perceptual": None},
            "optimizer": {"kind": "muon", "lr": 5e-3, "rest": {"kind": "adamw", "lr": 5e-3, "betas": [0.9, 0.95]}},
            "schedule": {"kind": "cosine", "warmup_steps": 50, "final": 0.02},
            "ema": [{"kind": "constant", "decay": 0.99, "warmup": True}],
            "train": {
                "num_steps": steps,
                "batch_size": 16,
                "validation": 0,
                "clip_norm": 1.0,
                "log_every": 50,
                "validate_every": steps,
                "save_every": steps,
            },
        }
    )


def trained(data: Path, work: Path, tau: float, seed: int, steps: int) -> RAECodec:
    name = f"tau-{tau}-seed-{seed}"
    if not (work / f"{name}.codec").exists():
        Trainer(recipe(data, tau, seed, steps), work / name).fit()
        export(work / name, work / f"{name}.codec")
    return RAECodec(str(work / f"{name}.codec"))


def decoded(codec: RAECodec, x: Tensor, noise: float) -> Tensor:
    """Pictures in [-1, 1] of the latents of ``x`` with noise; picture k always gets the same."""
    parts = []
    for index in torch.arange(len(x)).split(64):
        latents = codec.encode(x[index]).latents
        noisy = latents + noise * Draws(0).normal("benchmark", latents.shape[1:], index)
        parts.append(codec.decode(noisy).clamp(-1, 1))
    return torch.cat(parts)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) decibels, for pictures in [-1, 1]."""
    return -10 * ((a - b) / 2).square().flatten(1).mean(1).log10()


def spread(x: Tensor) -> Tensor:
    return x[:: len(x) // 6][:6]


def contrast_first(x: Tensor) -> Tensor:
    return x[x.flatten(1).std(1).argsort(descending=True)]


def sheet(rows: list[Tensor]) -> Image.Image:
    """(B, 3, H, W) in [-1, 1] each, one below the other."""
    lines = [torch.cat(list(row), dim=2) for row in rows]
    levels = ((torch.cat(lines, dim=1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(levels).resize((levels.shape[1] * 2, levels.shape[0] * 2), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("data/emoji"))
    parser.add_argument("--work", type=Path, default=Path("out/rae-noise"))
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    started, cpu = time.perf_counter(), time.process_time()

    drawn, crops = emoji(options.root), photographs()
    training = [*to_levels(drawn[0], 1200), *crops[0]]
    write(options.work / "data", training)
    held_out = {"emoji": to_levels(drawn[1], 192), "photographs": crops[1]}
    tensors = {n: torch.from_numpy(np.stack(p)).permute(0, 3, 1, 2).float() / 127.5 - 1 for n, p in held_out.items()}

    table: dict[str, Any] = {name: {} for name in tensors}
    rows: dict[float, Tensor] = {}
    for seed in range(options.seeds):
        for tau in TAUS:
            codec = trained(options.work / "data", options.work, tau, seed, options.steps)
            for name, x in tensors.items():
                values = {str(s): psnr(decoded(codec, x, s), x) for s in NOISE}
                table[name].setdefault(str(tau), []).append({s: float(v.mean()) for s, v in values.items()})
            shown = torch.cat([spread(tensors["emoji"]), spread(contrast_first(tensors["photographs"])[:24])])
            rows[tau] = decoded(codec, shown, 0.3)
    gains = {
        name: {str(s): [b[str(s)] - a[str(s)] for a, b in zip(*(of[str(tau)] for tau in TAUS))] for s in NOISE}
        for name, of in table.items()
    }
    sheet([shown, *(rows[tau] for tau in TAUS)]).save(ROOT / "docs" / "images" / "rae-noise.png")
    save(
        "rae_noise",
        {
            "command": f"python benchmarks/rae_noise.py --steps {options.steps} --seeds {options.seeds}",
            "training_pictures": {"emoji": len(training) - len(crops[0]), "photographs": len(crops[0])},
            "held_out_pictures": {name: len(x) for name, x in tensors.items()},
            "psnr_db": table,
            "gain_db": gains,
            "claim": "tau 0.8 gains at least 1 dB at noise 0.3",
            "holds": {name: min(of["0.3"]) >= 1 for name, of in gains.items()},
            "seconds": round(time.perf_counter() - started),
            "cpu_seconds": round(time.process_time() - cpu),
        },
    )


if __name__ == "__main__":
    main()
