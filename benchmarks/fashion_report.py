"""Are the pictures of clothing recognisable, and are they new? Judged with real Fashion-MNIST only.

    python benchmarks/fashion_report.py --checkpoint ddt-fashion --record

The classifier is a small convolutional network trained on the 60 000 real training images; its accuracy on the 10 000
test images is stated. The copy tests are those of the digits demo, against all training images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import save
from torch import Tensor, nn

import untwine
from untwine.cli.options import show
from untwine.data.fashion import FashionMNIST
from untwine.pipelines.writing import make_grid, prepare_folder, save_samples


class Classifier(nn.Module):
    """Two convolutions and two linear layers on 28 x 28 images in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 49, 128),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def train_classifier(x: Tensor, y: Tensor, epochs: int) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    steps = epochs * (len(x) // 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        loss = F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: Classifier, x: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(1000)])


def pairwise(x: Tensor) -> float:
    """Mean distance between different rows."""
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def nearest(x: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each row to the nearest row of ``among``, and which that is."""
    found = [torch.cdist(part, among).min(1) for part in x.split(100)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def judge(made: Tensor, labels: Tensor, epochs: int) -> tuple[dict[str, Any], Tensor]:
    """The report, and the nearest training image of each made one (28 x 28 in [0, 1])."""
    real, test = FashionMNIST(part="train"), FashionMNIST(part="test")
    x, held = (torch.from_numpy(d.images).float().div(255)[:, None] for d in (real, test))
    y, held_labels = (torch.from_numpy(d.labels) for d in (real, test))
    classifier = train_classifier(x, y, epochs)
    flat, held_flat = x.flatten(1), held.flatten(1)
    distance, closest = nearest(made.flatten(1), flat)
    spread = []
    for c in labels.unique():
        mine = made[labels == c].flatten(1)
        spread.append(pairwise(mine) / pairwise(flat[y == c][: 10 * len(mine)]))
    report = {
        "images": len(made),
        "recognised": float((predict(classifier, made) == labels).float().mean()),
        "classifier_accuracy": float((predict(classifier, held) == held_labels).float().mean()),
        "diversity": float(np.mean(spread)),
        "novelty": float(distance.median() / nearest(held_flat[:1000], flat)[0].median()),
    }
    return report, x[closest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="ddt-fashion")
    parser.add_argument("--out", type=Path, default=Path("out/fashion"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=4, help="of the classifier")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/")
    options = parser.parse_args()
    out = prepare_folder(options.out)
    samples = untwine.sample(options.checkpoint, count=options.count, seed=1, batch_size=100)
    save_samples(samples, out, columns=20, pictures=False)
    made = torch.from_numpy(samples.images[..., 0]).float().div(255)[:, None, 2:30, 2:30]
    assert samples.labels is not None
    checks, closest = judge(made, torch.from_numpy(samples.labels), options.epochs)
    pairs = torch.cat([made[:20], closest[:20]]).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    make_grid(pairs, columns=20, scale=2).save(out / "nearest.png")
    if options.record:
        report = {key: samples.report[key] for key in ("seconds", "sampling", "origin")}
        save("fashion", {"checkpoint": options.checkpoint, "checks": checks, **report})
    show(
        "Fashion-MNIST",
        {**checks, "look at": f"{out / 'grid.png'}; samples above their nearest: {out / 'nearest.png'}"},
    )


if __name__ == "__main__":
    main()
