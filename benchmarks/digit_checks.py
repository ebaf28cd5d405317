"""Are generated digits recognisable, and are they new? Judged with real digits only."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.svm import SVC

from untwine.data.base import Dataset


def as_matrix(dataset: Dataset) -> np.ndarray:
    """(N, 64) pixels in [0, 1]."""
    return np.stack([(dataset.read(k).numpy().reshape(-1) + 1) / 2 for k in range(len(dataset))])


def judge(images: np.ndarray, labels: np.ndarray, training: Dataset, held_out: Dataset) -> dict[str, Any]:
    """Recognition by a classifier of real digits, and the two copy tests.

    Args:
        images: (N, 8, 8, 1) uint8.
        labels: (N,) the classes that were asked for.

    Returns:
        ``recognised`` share of images classified as asked; ``classifier_accuracy`` on held-out real digits;
        ``diversity`` mean within-class pairwise distance over that of real digits (1 = as varied);
        ``novelty`` median distance to the nearest training image over that of held-out images (0 = copies).
    """
    assert training.labels is not None and held_out.labels is not None
    real, other = as_matrix(training), as_matrix(held_out)
    made = images.reshape(len(images), -1) / 255
    classifier = SVC(C=10, gamma=0.25).fit(real, training.labels)
    spread = [_pairwise(made[labels == c]) / _pairwise(real[training.labels == c]) for c in np.unique(labels)]
    return {
        "images": len(images),
        "recognised": float((classifier.predict(made) == labels).mean()),
        "classifier_accuracy": float((classifier.predict(other) == held_out.labels).mean()),
        "diversity": float(np.mean(spread)),
        "novelty": float(np.median(_nearest(made, real)) / np.median(_nearest(other, real))),
    }


def _pairwise(x: np.ndarray) -> float:
    """Mean distance between different rows."""
    distances = np.sqrt(np.square(x[:, None] - x[None]).sum(-1))
    return float(distances.sum() / (len(x) * (len(x) - 1)))


def _nearest(x: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Distance of each row to the nearest row of ``among``."""
    return np.array([np.sqrt(np.square(among - row).sum(-1).min()) for row in x])
