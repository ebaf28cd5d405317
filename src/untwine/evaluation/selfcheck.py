"""Does the metric on this machine give known numbers? Takes seconds, offline."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from untwine.diffusion.draws import Draws
from untwine.evaluation.evaluator import Evaluator
from untwine.evaluation.pictures import from_array
from untwine.evaluation.protocols import Protocol
from untwine.evaluation.references import Bank, Reference, read_reference, write_reference
from untwine.evaluation.statistics import Gaussian, Moments, frechet_distance

SHIPPED = Path(__file__).with_name("selfcheck.json")
"""encoder -> metric -> value, for :func:`shapes`"""
TOLERANCE = {"pixels": 1e-5, "efflite0": 2e-3}
"""relative; convolutions round differently from one machine to another"""


@dataclass(frozen=True)
class Check:
    """One known number and what came out."""

    name: str
    expected: float
    found: float
    tolerance: float
    """relative"""
    skipped: str = ""
    """why it could not be made"""

    @property
    def passed(self) -> bool:
        """Whether the numbers agree; true where the check was skipped."""
        return bool(self.skipped) or abs(self.found - self.expected) <= self.tolerance * abs(self.expected)


def self_check() -> Iterator[Check]:
    """Closed forms, ADM's file format, and the shipped numbers of every encoder whose weights are installed."""
    yield _closed_form()
    yield _adm_file()
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    for encoder, values in shipped.items():
        try:
            found = measure_shapes(encoder)
        except ImportError as error:
            yield Check(f"shapes, {encoder}", 0, 0, 0, skipped=str(error))
            continue
        for metric, expected in values.items():
            yield Check(f"shapes, {encoder}: {metric}", expected, found[metric], TOLERANCE[encoder])


def _closed_form() -> Check:
    """Features whose mean and covariance are known exactly; the covariances are 2 x 2 blocks that do not commute.

    For 2 x 2 matrices ``tr (C1 C2)^(1/2) = (tr C1 C2 + 2 (det C1 C2)^(1/2))^(1/2)``.
    """
    white = Draws(1).normal("self-check", (8,), range(64)).double()
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / (len(white) - 1))).T
    gaussians, blocks = [], []
    for k in range(2):
        factors = Draws(2 + k).uniform("self-check", (2, 2), range(4)).double() + torch.eye(2)
        features = white @ torch.block_diag(*factors.mT) + 0.5 * k
        gaussians.append(Moments.of(features.split(7)).gaussian())
        blocks.append(factors @ factors.mT)
    product = blocks[0] @ blocks[1]
    root = (_trace(product) + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = 8 * 0.25 + (_trace(blocks[0]) + _trace(blocks[1]) - 2 * root).sum()
    return Check("Frechet distance of known Gaussians", float(expected), frechet_distance(*gaussians), 1e-9)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _adm_file() -> Check:
    """Statistics and pictures through ADM's ``.npz`` and back; counts the entries that come back changed."""
    pooled, spatial = (Moments.of(Draws(3).normal(name, (6,), range(20))).gaussian() for name in ("mu", "mu_s"))
    images = shapes(4, radius=6)
    none = torch.zeros(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.npz"
        write_reference(path, Bank(none, none, none.long(), pooled, spatial), images)
        again = read_reference(path)
    pictures = again.pictures((32, 32))
    assert pictures is not None
    changed = sum(_differences(*pair) for pair in ((pooled, again.pool), (spatial, again.spatial)))
    changed += sum(int((pictures.read(k) != image).sum()) for k, image in enumerate(images))
    return Check("entries changed by ADM's .npz", 0, changed, 0)


def _differences(a: Gaussian, b: Gaussian | None) -> int:
    if b is None:
        return a.covariance.numel()
    return int((a.mean != b.mean).sum() + (a.covariance != b.covariance).sum())


def shapes(count: int, *, radius: float, first: int = 0) -> np.ndarray:
    """(count, 32, 32, 3) uint8 drawn discs of random place and colour, about ``radius`` pixels."""
    u = Draws(4).uniform("shapes", (9,), range(first, first + count)).double()
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centre, size = 8 + 16 * u[:, :2, None, None], radius * (0.8 + 0.4 * u[:, 2, None, None])
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).sqrt()
    ink = (size - distance + 0.5).clamp(0, 1)[:, None]
    colour, ground = u[:, 3:6, None, None], u[:, 6:9, None, None]
    return (255 * (ink * colour + (1 - ink) * ground)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def measure_shapes(encoder: str) -> dict[str, float]:
    """The metrics of small discs against larger ones."""
    protocol = Protocol(
        name="self-check",
        encoder=encoder,
        num_samples=128,
        metrics=("fd", "kid", "precision_recall", "density_coverage"),
        principal_axes=16,
        kernel_subsets=5,
        kernel_subset_size=64,
    )
    real = from_array(shapes(192, radius=8), "shapes")
    evaluator = Evaluator(Reference("shapes", lambda size: real), protocol)
    evaluator.update(torch.from_numpy(shapes(128, radius=7, first=192)).permute(0, 3, 1, 2))
    return evaluator.result().metrics
