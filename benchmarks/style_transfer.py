"""LoRA style transfer of the emoji DDT from Google's drawings to Twitter's, judged on emoji that no run has seen.

    python benchmarks/style_transfer.py --base runs/emoji-google --work out/style

Three models: the base, the base with a LoRA (recipe emoji-style-lora), and the base fine-tuned as a whole for as many
steps at a quarter of the rate. Each redraws the held-out emoji from Google's drawing, noised to ``--strength``, and the
redrawn set is compared with Twitter's set of the same emoji: kernel distance (KID) of EfficientNet-Lite0 features. The
same is taken picture by picture, as the distance to Twitter's drawing in units of the distance between the two drawings
themselves (1 = as far as Google's drawing, 0 = Twitter's). Beside them: the loss on Twitter's held-out emoji at fixed
(image, t, noise) triples.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save
from PIL import Image
from torch import Tensor

import untwine
from untwine.config import Component
from untwine.contracts import Condition
from untwine.data.base import Dataset
from untwine.diffusion.draws import Draws
from untwine.diffusion.sampling import guided_by, integrate
from untwine.encoders.efflite import EfficientNetLite0
from untwine.evaluation.metrics import kernel_distance
from untwine.training.distributed import Distributed
from untwine.training.optim import AdamW
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer
from untwine.training.validation import Validation


def recipes(root: Path, steps: int | None) -> dict[str, Recipe]:
    lora = Recipe.load("emoji-style-lora")
    lora = replace(lora, data=lora.data.replace(root=str(root)))
    if steps is not None:
        lora = replace(lora, train=replace(lora.train, num_steps=steps, validate_every=steps))
    assert isinstance(lora.optimizer, AdamW)
    whole = replace(lora, adapter=None, optimizer=replace(lora.optimizer, lr=lora.optimizer.lr / 4))
    return {"LoRA": lora, "full fine-tuning": replace(whole, name="emoji-style-full")}


def held_out(root: Path, style: str) -> Dataset:
    recipe = Recipe.load("emoji-style-lora")
    dataset = Component(recipe.data.registry, "emoji", {"root": str(root), "styles": [style]}).build()
    return dataset.split(recipe.train.validation, recipe.seed)[1]


def pictures(dataset: Dataset) -> Tensor:
    return torch.stack([dataset.read(i) for i in range(len(dataset))])


@torch.no_grad()
def redraw(pipe: Any, x0: Tensor, labels: Tensor, strength: float, batch: int) -> Tensor:
    """``x0`` noised to t = ``strength`` and denoised again; x in [-1, 1]."""
    sampling, path = replace(pipe.sampling, num_inference_steps=25), pipe.path
    grid = sampling.grid(path)
    start = int((grid - strength).abs().argmin())
    noise = Draws(7).normal("redraw", x0.shape[1:], range(len(x0)))
    at = path.at(grid[start])
    noised = (at.alpha * x0 + at.sigma * noise).float()
    done = []
    for rows in torch.arange(len(x0)).split(batch):
        guided = guided_by(sampling, pipe.model, Condition(labels=labels[rows]), grid, path)
        done.append(integrate(sampling.solver, guided, noised[rows], grid, path=path, start=start))
    return torch.cat(done).clamp(-1, 1)


def held_out_loss(pipe: Any, dataset: Dataset) -> float:
    """At fixed (image, t, noise) triples."""
    objective, alone = Recipe.load("emoji-style-lora").objective.build(), Distributed(torch.device("cpu"))
    triples = Validation(dataset, pipe.codec, seed=0, batch_size=64, processes=alone)
    return float(triples.measure({"model": pipe.model}, objective, step=0, precision=nullcontext)["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the run of emoji-google")
    parser.add_argument("--root", type=Path, default=Path("data/emoji"))
    parser.add_argument("--work", type=Path, default=Path("out/style"))
    parser.add_argument("--strength", type=float, default=0.85)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--limit", type=int, help="judge so many emoji only")
    options = parser.parse_args()
    google, twitter = (held_out(options.root, style) for style in ("google", "twitter"))
    assert google.names is not None and twitter.names is not None and google.labels is not None
    assert [n.split("/")[1] for n in google.names] == [n.split("/")[1] for n in twitter.names]
    chosen = slice(None) if options.limit is None else slice(options.limit)
    source, target = pictures(google)[chosen], pictures(twitter)[chosen]
    labels, encoder = torch.from_numpy(google.labels)[chosen], EfficientNetLite0()

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([encoder((part + 1) / 2).pooled for part in x.split(64)])

    drawn, rows = {}, {}
    aim = features(target)
    own = (features(source) - aim).norm(dim=1)

    def kid(found: Tensor) -> dict[str, float]:
        kid = kernel_distance(found, aim, subsets=50, subset_size=len(aim) // 2, seed=0)
        return {"kid": kid.mean, "kid_std": kid.std}

    def judge(name: str, pipe: Any) -> dict[str, Any]:
        drawn[name] = redraw(pipe, source, labels, options.strength, 64)
        found = features(drawn[name])
        ratio = (found - aim).norm(dim=1) / own
        return {
            **kid(found),
            "distance_to_target": float(ratio.mean()),
            "interval_95": 1.96 * float(ratio.std()) / len(ratio) ** 0.5,
            "loss": held_out_loss(pipe, twitter),
        }

    rows["Google's drawings"] = kid(features(source))
    rows["no adapter"] = judge("no adapter", untwine.load(str(options.base)))
    for name, recipe in recipes(options.root, options.steps).items():
        folder = options.work / recipe.name
        Trainer(recipe, folder, init=options.base).fit()
        rows[name] = judge(name, untwine.load(str(folder)))
    adapter = options.work / "emoji-style-lora" / "adapter" / "adapter_model.safetensors"
    rows["LoRA"]["megabytes"] = round(adapter.stat().st_size / 1e6, 3)
    parameters = sum(p.numel() for p in untwine.load(str(options.base)).model.parameters())
    rows["full fine-tuning"]["megabytes"] = round(2 * parameters / 1e6, 3)
    sheet([source, *drawn.values(), target]).save(options.work / "style.png")
    settings = {"strength": options.strength, "held_out": len(source), "steps": recipe.train.num_steps}
    save("style_transfer", {"settings": settings, "models": rows})


def sheet(rows: list[Tensor], columns: int = 12) -> Image.Image:
    """One row of pictures for each of ``rows``, evenly chosen."""
    chosen = torch.linspace(0, len(rows[0]) - 1, columns).long()
    lines = [torch.cat(list(row[chosen]), -1) for row in rows]
    pixels = ((torch.cat(lines, -2) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


if __name__ == "__main__":
    main()
