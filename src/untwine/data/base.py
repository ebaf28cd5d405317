"""What every data set offers, and the division into training and held-out parts."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from untwine.codecs.base import Codec
from untwine.diffusion.draws import Draws


class CorruptImage(ValueError):
    """A file that cannot be used as an image; the message names it and says why."""


class Dataset(ABC):
    """Samples by position, with optional class labels or captions."""

    kinds: ClassVar[str] = "untwine.data:DATASETS"
    num_classes: int = 0
    """0 = no classes"""
    class_names: tuple[str, ...] = ()
    sample_shape: tuple[int, int, int]
    """(C, H, W)"""
    labels: np.ndarray | None = None
    """(len,) int64 in [0, num_classes), or None"""
    captions: list[str] | None = None
    names: list[str] | None = None
    """what the source calls each sample, such as a relative path"""
    groups: np.ndarray | None = None
    """(len,) int64: samples of one group, such as two drawings of one thing, are held out together or not at all"""
    flip: bool = False
    """whether :meth:`read` mirrors half of the samples, where it is given draws"""
    crop: Literal["center", "random"] = "center"
    """of the samples, where it is given draws"""
    max_corrupt: float = 0.0
    """fraction of unreadable samples at which reading stops"""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        """The sample at ``position``: (C, H, W) float32 in [-1, 1].

        Augmentation is a function of (draws, index), the global sample counter; without draws there is none.

        Raises:
            CorruptImage: if it cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that tell this data from other data: count, bytes and sampled hashes."""

    def bind(self, codec: Codec) -> Codec:
        """The codec that encodes what :meth:`read` returns, for data whose latents ``codec`` shall decode."""
        return codec

    def check(self, codec: Codec, model: Any) -> None:  # noqa: B027 - where all samples have one shape, nothing
        """Raises ValueError where ``codec`` or ``model`` cannot take samples of other shapes than ``sample_shape``."""

    def split(self, validation: int | float, seed: int) -> tuple[Dataset, Dataset]:
        """(training, held out): a count or a fraction in [0, 1) of the samples is held out, stratified by class.

        The division is a function of (seed, labels, groups). Both parts keep the label ids and class names. With
        groups, whole groups are held out, each counted under the class of its first sample, so that the count is met
        only as closely as they allow.
        """
        size = len(self)
        count = round(validation * size) if isinstance(validation, float) else validation
        if not 0 <= count < size or validation < 0:
            raise ValueError(
                f"validation must be a count in [0, {size - 1}] or a fraction in [0, 1) of {size} samples, "
                f"got {validation}"
            )
        groups = np.arange(size) if self.groups is None else self.groups
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        labels = np.zeros(len(first), np.int64) if self.labels is None else self.labels[first]
        order = Draws(seed).permutation("validation", len(first), 0)
        quota = _quotas(np.bincount(labels, minlength=self.num_classes), round(count * len(first) / size))
        held = np.concatenate([order[labels[order] == label][:n] for label, n in enumerate(quota)])
        mask = np.isin(group, held)
        return Subset(self, np.flatnonzero(~mask)), Subset(self, np.flatnonzero(mask))


class Subset(Dataset):
    """The samples of another data set at the given positions."""

    def __init__(self, dataset: Dataset, positions: np.ndarray) -> None:
        self.dataset = dataset
        self.positions = positions
        self.num_classes = dataset.num_classes
        self.class_names = dataset.class_names
        self.sample_shape = dataset.sample_shape
        self.max_corrupt, self.flip, self.crop = dataset.max_corrupt, dataset.flip, dataset.crop
        self.labels = None if dataset.labels is None else dataset.labels[positions]
        self.groups = None if dataset.groups is None else dataset.groups[positions]
        self.captions = None if dataset.captions is None else [dataset.captions[p] for p in positions]
        self.names = None if dataset.names is None else [dataset.names[p] for p in positions]

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        return self.dataset.read(int(self.positions[position]), draws=draws, index=index)

    def bind(self, codec: Codec) -> Codec:
        return self.dataset.bind(codec)

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.ascontiguousarray(self.positions, np.int64).tobytes()).hexdigest()
        return {**self.dataset.fingerprint(), "subset": {"count": len(self), "sha256": digest}}


def _quotas(counts: np.ndarray, total: int) -> np.ndarray:
    """``total`` shared out in proportion to ``counts``, by largest remainder (ties to the lower class)."""
    exact = counts * (total / counts.sum())
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: total - quotas.sum()]] += 1
    return quotas
