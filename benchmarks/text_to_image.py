"""Does the picture show what the prompt says? Top-1 of 10 by a frozen scorer, on emoji that no model has seen.

    python benchmarks/text_to_image.py --root data/emoji --checkpoint ddt-emoji-text --record

The prompts are the names of the held-out emoji of the recipe. The scorer is a linear map from EfficientNet-Lite0
features to MiniLM sentence vectors (ridge regression, its strength by cross-validation over emoji), fitted to the real
training emoji and their names: a picture is given to that one of ten names whose vector is nearest. The other nine are
names of other held-out emoji, drawn once under a fixed seed. Chance is 10 %; the ceiling is the scorer on the real
held-out pictures. Intervals are 95 % by bootstrap over names.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import save
from PIL import Image, ImageDraw
from torch import Tensor

import untwine
from untwine.conditions.text import Text
from untwine.data.base import Dataset
from untwine.data.emoji import Emoji
from untwine.encoders.efflite import EfficientNetLite0
from untwine.pipelines.image import to_pil
from untwine.pipelines.writing import prepare_folder
from untwine.training.recipe import Recipe

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
FOLDS, CHOICES = 5, 10


@dataclass(frozen=True)
class Part:
    """Real emoji: features of the pictures, and what they show."""

    features: Tensor
    """(N, F)"""
    names: list[str]
    groups: np.ndarray
    """(N,) two drawings of one emoji have one group"""


class Features:
    """Square roots of EfficientNet-Lite0's mean and largest activations: (B, F) of pictures in [0, 1]."""

    def __init__(self) -> None:
        self.encoder = EfficientNetLite0(128)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        found = [self.encoder(part) for part in pictures.split(64)]
        return torch.cat([torch.cat((f.pooled, f.tokens.amax(1)), 1) for f in found]).clamp(min=0).sqrt()

    def of(self, dataset: Dataset) -> Part:
        pictures = torch.stack([dataset.read(k) for k in range(len(dataset))])
        return Part(self((pictures + 1) / 2), list(dataset.captions or ()), np.asarray(dataset.groups))


class Scorer:
    """Ridge regression from features to centred, normalised sentence vectors."""

    def __init__(self, part: Part, vectors: dict[str, Tensor], strength: float) -> None:
        self.mean, self.std = part.features.mean(0), part.features.std(0) + 1e-3
        self.vectors = vectors
        targets = torch.stack([vectors[name] for name in part.names]).double()
        x = self._standard(part.features).double()
        ridge = strength * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
        self.weights = torch.linalg.solve(x.T @ x + ridge, x.T @ targets).float()

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def chosen(self, features: Tensor, candidates: list[list[str]]) -> np.ndarray:
        """(N,) place of the name that fits best among the candidates of each picture."""
        found = self._standard(features) @ self.weights
        names = torch.stack([torch.stack([self.vectors[name] for name in row]) for row in candidates])
        return torch.einsum("nd,nkd->nk", found, names).argmax(1).numpy()


def sentence_vectors(names: list[str], centre: list[str]) -> dict[str, Tensor]:
    """Of each name, centred on those of ``centre``: all emoji names have much in common."""
    text = Text("minilm", max_tokens=24, pooled=True)
    distinct = list(dict.fromkeys(names))
    found = dict(zip(distinct, text.encode(distinct).vectors["text"][:, 0]))
    mean = torch.stack([found[name] for name in centre]).mean(0)
    return {name: F.normalize(vector - mean, dim=0) for name, vector in found.items()}


def candidates(part: Part, seed: int = 0) -> list[list[str]]:
    """For each picture its own name, then nine of other emoji; the same nine for all drawings of one emoji."""
    rng = np.random.default_rng(seed)
    first = {g: part.names[k] for k, g in reversed(list(enumerate(part.groups)))}
    groups = sorted(first)
    others = {g: rng.choice([o for o in groups if o != g], CHOICES - 1, replace=False) for g in groups}
    return [[first[g], *(first[o] for o in others[g])] for g in part.groups]


def subset(part: Part, rows: np.ndarray) -> Part:
    return Part(part.features[torch.from_numpy(rows)], [part.names[k] for k in rows], part.groups[rows])


def cross_validated(part: Part, vectors: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """The strength with the best top-1 of 10 on left-out training emoji, and that of each."""
    fold = np.random.default_rng(0).permutation(part.groups.max() + 1)[part.groups] % FOLDS
    accuracy = dict.fromkeys(STRENGTHS, 0.0)
    for k in range(FOLDS):
        inside, left_out = (subset(part, np.flatnonzero(rows)) for rows in (fold != k, fold == k))
        for strength in STRENGTHS:
            chosen = Scorer(inside, vectors, strength).chosen(left_out.features, candidates(left_out))
            accuracy[strength] += float((chosen == 0).mean()) / FOLDS
    return max(accuracy, key=lambda s: accuracy[s]), {str(s): round(a, 4) for s, a in accuracy.items()}


def interval(hits: np.ndarray, groups: np.ndarray, repeats: int = 2000) -> dict[str, Any]:
    """Share of hits, a mean over emoji, with its 95 % bootstrap interval over emoji."""
    each = np.array([hits[groups == g].mean() for g in np.unique(groups)])
    means = each[np.random.default_rng(0).integers(0, len(each), (repeats, len(each)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "top1_of_10": round(float(each.mean()), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "emoji": len(each),
        "pictures": len(hits),
    }


def page(pictures: np.ndarray, prompts: list[str], columns: int = 8, scale: int = 2) -> Image.Image:
    """(N, H, W, 3) uint8 pictures with their prompts below, on white."""
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    cell, rows = (width + 8, height + 40), -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (picture, prompt) in enumerate(zip(pictures, prompts)):
        x, y = k % columns * cell[0] + 4, k // columns * cell[1] + 4
        sheet.paste(to_pil(picture).resize((width, height), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + height + 2), "\n".join(wrapped(prompt, width // 6)[:3]), fill="black", font_size=10, spacing=1)
    return sheet


def wrapped(text: str, letters: int) -> list[str]:
    lines = [""]
    for word in text.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < letters else [*lines, word]
    return lines


def drawn(pipe: Any, held_out: Part, each: int, options: argparse.Namespace) -> tuple[np.ndarray, list[str], Part]:
    """Pictures, prompts and features of ``each`` drawings of every held-out name."""
    first = [int(np.flatnonzero(held_out.groups == g)[0]) for g in np.unique(held_out.groups)][: options.limit]
    names = [held_out.names[k] for k in first for _ in range(each)]
    changes = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    made = untwine.sample(pipe, count=len(names), prompts=names, seed=options.seed, batch_size=64, **changes)
    pictures = torch.from_numpy(made.images).permute(0, 3, 1, 2) / 255
    return made.images, names, Part(Features()(pictures), names, np.repeat(held_out.groups[first], each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/emoji"))
    parser.add_argument("--checkpoint", help="what to judge; without it the ceiling alone is measured")
    parser.add_argument("--each", type=int, default=2, help="drawings of a name")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, help="judge so many names only")
    parser.add_argument("--out", type=Path, default=Path("out/text"))
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/")
    options = parser.parse_args()
    recipe, out = Recipe.load("ddt-emoji-text"), prepare_folder(options.out)
    training, held_out = Emoji(options.root).split(recipe.train.validation, recipe.seed)
    features = Features()
    train, held = features.of(training), features.of(held_out)
    vectors = sentence_vectors([*train.names, *held.names], train.names)
    strength, tried = cross_validated(train, vectors)
    scorer = Scorer(train, vectors, strength)
    report: dict[str, Any] = {
        "scorer": {"ridge": strength, "cross_validated": tried, "training_pictures": len(train.names)},
        "chance": 1 / CHOICES,
        "ceiling": interval(scorer.chosen(held.features, candidates(held)) == 0, held.groups),
    }
    if options.checkpoint is not None:
        pipe = untwine.load(options.checkpoint)
        pictures, prompts, made = drawn(pipe, held, options.each, options)
        choices = {names[0]: names for names in candidates(held)}
        hits = scorer.chosen(made.features, [choices[name] for name in prompts]) == 0
        report["generated"] = interval(hits, made.groups)
        ceiling = report["ceiling"]["top1_of_10"]
        reached = (report["generated"]["top1_of_10"] - 1 / CHOICES) / (ceiling - 1 / CHOICES)
        report |= {"share_of_the_way": round(reached, 4), "checkpoint": options.checkpoint, "origin": pipe.origin}
        spread = np.linspace(0, len(prompts) // options.each - 1, 64).astype(int) * options.each
        page(pictures[spread], [prompts[k] for k in spread]).save(out / "prompts.png")
    if options.record:
        save("text_to_image", report)
    else:
        print(report)


if __name__ == "__main__":
    main()
