"""From a stream of samples to a report: the metrics of a protocol, the floor of the reference, the copies."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import untwine
from untwine.data.base import Dataset
from untwine.diffusion.draws import Draws
from untwine.encoders.base import Encoder
from untwine.evaluation import metrics
from untwine.evaluation.extraction import Extracted, Extractor
from untwine.evaluation.memorisation import Neighbours, neighbours
from untwine.evaluation.protocols import DEFAULT, Protocol, find_protocol
from untwine.evaluation.references import Bank, Reference, build_bank, open_reference
from untwine.evaluation.statistics import Gaussian, Moments, frechet_distance, gather

_WANTS = {"is": "logits", "sfid": "spatial"}
_PACKAGES = ("torch", "numpy", "pillow", "torch-fidelity", "efficientnet-lite-pytorch", "transformers")


@dataclass(frozen=True)
class Report:
    """The result of an evaluation."""

    values: dict[str, Any]
    """JSON: protocol, metrics, floor, counts, memorisation, encoder, reference, versions"""
    nearest: Neighbours | None = None
    """of each sample among the reference pictures, by features; None where the reference has no pictures"""

    @property
    def metrics(self) -> dict[str, float]:
        """By name."""
        return self.values["metrics"]


class Evaluator:
    """Collects samples and compares them with a reference; a run can be evaluated again and again.

    In a distributed run every process gives other samples, with their global ``index``, and all call :meth:`result`.

    Args:
        reference: whatever :func:`~untwine.evaluation.references.open_reference` takes.
        protocol: a registered name, or a protocol.
        encoder: instead of the protocol's, which then names it.
        batch_size: pictures encoded at once; changes speed, and features by rounding.
        cache: folder that keeps the features of references.

    Raises:
        ValueError: for an unknown protocol or reference.
    """

    def __init__(
        self,
        reference: str | Path | Dataset | Reference,
        protocol: str | Protocol = DEFAULT,
        *,
        encoder: Encoder | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        cache: Path | None = None,
    ) -> None:
        self.protocol = find_protocol(protocol)
        self.reference = open_reference(reference)
        self.device = torch.device(device)
        self.encoder = (encoder or self.protocol.build_encoder()).to(self.device)
        if self.encoder.name != self.protocol.encoder:
            self.protocol = replace(self.protocol, encoder=self.encoder.name)
        self.batch_size, self.cache = batch_size, cache
        self._banks: dict[tuple[int, int], Bank] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets the samples, and keeps the reference."""
        wanted = {_WANTS[name] for name in self.protocol.metrics if name in _WANTS}
        self._extractor = Extractor(self.encoder, self.batch_size, wanted)
        self._size: tuple[int, int] | None = None

    def update(self, images: Tensor, index: Tensor | None = None) -> None:
        """Adds samples (B, 3 or 1, H, W), uint8 or float in [0, 1]; those beyond the protocol's count are ignored.

        Args:
            index: (B,) of the samples in the whole set, [0, num_samples); default: as they come.
        """
        if index is None:
            first = self._extractor.count
            index = torch.arange(first, first + len(images))
        kept = index.cpu() < self.protocol.num_samples
        if kept.any():
            self._size = (images.shape[-2], images.shape[-1])
            self._extractor.update(self.protocol.to_uint8(images.cpu()[kept]), index.cpu()[kept])

    def result(self) -> Report:
        """The report on all samples of all processes; collective, and the same on each.

        Raises:
            ValueError: for fewer samples than the protocol asks for, or a reference too small for its metrics.
        """
        protocol, started = self.protocol, time.perf_counter()
        samples = self._extractor.gathered()
        if len(samples.pooled) < protocol.num_samples:
            raise ValueError(
                f"samples: {len(samples.pooled)} pictures, and protocol {protocol.name} compares "
                f"{protocol.num_samples}; give more, or set num_samples (the result then says so)"
            )
        bank = self._bank()
        samples = replace(samples, pooled=samples.pooled.to(self.device), pixels=samples.pixels.to(self.device))
        found, notes = measure(samples, bank, protocol)
        nearest, summary = copies(samples, bank)
        values = {
            "protocol": protocol.to_dict(),
            "metrics": found,
            "details": notes,
            "floor": floor(bank, protocol, notes["principal_axes"]),
            "memorisation": summary,
            "counts": {
                "samples": len(samples.pooled),
                "reference": bank.gaussian.count,
                "reference_pictures": len(bank.pooled),
            },
            "encoder": self.encoder.fingerprint(),
            "reference": {"source": self.reference.source, **bank.data},
            "versions": _versions(),
            "device": str(self.device),
            "seconds": round(time.perf_counter() - started, 3),
        }
        return Report(values, None if nearest is None else replace(nearest, position=bank.positions[nearest.position]))

    def _bank(self) -> Bank:
        """The reference at the samples' size, encoded once."""
        size = next(size for size in gather(self._size) if size)
        if size not in self._banks:
            bank = build_bank(
                self.reference, self.encoder, self.protocol, size, cache=self.cache, batch_size=self.batch_size
            )
            pooled, pixels = bank.pooled.to(self.device), bank.pixels.to(self.device)
            self._banks[size] = replace(bank, pooled=pooled, pixels=pixels)
        return self._banks[size]


def measure(samples: Extracted, bank: Bank, protocol: Protocol) -> tuple[dict[str, float], dict[str, Any]]:
    """(the metrics of ``protocol``, details of how they came about), by name.

    Raises:
        ValueError: where the sets are too small for a metric, or the reference lacks what it needs.
    """
    axes = protocol.axes_for(len(samples.pooled), bank.gaussian.count)
    values: dict[str, float] = {}
    notes: dict[str, Any] = {"principal_axes": axes}
    for name in protocol.metrics:
        if name in ("fid", "fd"):
            values[name] = _distance(Moments.of(samples.pooled).gaussian(), bank.gaussian, axes)
        elif name == "sfid":
            if bank.spatial is None:
                raise ValueError("metrics: 'sfid' needs pictures, or mu_s and sigma_s, in the reference")
            values[name] = _distance(samples.spatial.gaussian(), bank.spatial, axes)
        elif name == "is" and samples.logits is not None:
            score, whole = (metrics.inception_score(samples.logits, n) for n in (protocol.inception_splits, 1))
            values |= {"is": score.mean, "is_std": score.std, "is_whole": whole.mean}
        elif not len(bank.pooled):
            notes[name] = "not measured: the reference holds statistics and no pictures"
        else:
            _from_pictures(name, samples.pooled, bank.pooled, protocol, values, notes)
    return values, notes


def _distance(samples: Gaussian, reference: Gaussian, axes: int | None, *, basis: Gaussian | None = None) -> float:
    """Frechet distance in all features, or on that many principal axes of ``basis``, by default the reference."""
    if axes is None:
        return frechet_distance(samples, reference)
    directions = (basis or reference).principal_axes(axes)
    return frechet_distance(samples.project(directions), reference.project(directions))


def _kid(samples: Tensor, reference: Tensor, protocol: Protocol) -> tuple[metrics.Spread, int]:
    """(KID, size of the subsets: the protocol's, or as many as there are)."""
    size = min(protocol.kernel_subset_size, len(samples), len(reference))
    kid = metrics.kernel_distance(
        samples, reference, subsets=protocol.kernel_subsets, subset_size=size, seed=protocol.seed
    )
    return kid, size


def _from_pictures(
    name: str,
    samples: Tensor,
    reference: Tensor,
    protocol: Protocol,
    values: dict[str, float],
    notes: dict[str, Any],
) -> None:
    """Adds a metric that needs the features of single reference pictures."""
    if name == "kid":
        kid, notes["kid_subset_size"] = _kid(samples, reference, protocol)
        values |= {"kid": kid.mean, "kid_std": kid.std}
        return
    chosen = _shuffled(reference, protocol)[: protocol.manifold_reference]
    notes["manifold_reference"] = len(chosen)
    if name == "precision_recall":
        values["precision"], values["recall"] = metrics.precision_recall(samples, chosen, k=protocol.neighbours)
    else:
        values["density"], values["coverage"] = metrics.density_coverage(samples, chosen)


def floor(bank: Bank, protocol: Protocol, axes: int | None) -> dict[str, Any] | None:
    """The distances between two disjoint sets of reference pictures: what perfect samples would measure, about.

    The first set has as many pictures as the samples, or half of the reference where that is fewer, the second the
    rest. None where the reference has no pictures.
    """
    count = min(protocol.num_samples, len(bank.pooled) // 2)
    if count < 2:
        return None
    shuffled = _shuffled(bank.pooled, protocol)
    first, second = shuffled[:count], shuffled[count:]
    values: dict[str, Any] = {"count": count, "against": len(second)}
    for name in protocol.metrics:
        if name == "kid":
            values[name] = _kid(first, second, protocol)[0].mean
        elif name in ("fid", "fd"):
            try:
                one, other = (Moments.of(features).gaussian() for features in (first, second))
                values[name] = _distance(one, other, axes, basis=bank.gaussian)
            except ValueError as error:  # halves of a small reference may be too few for all features
                values[name] = f"not measured: {error}"
    return values


def copies(samples: Extracted, bank: Bank) -> tuple[Neighbours | None, dict[str, Any]]:
    """Nearest reference pictures by features, and a summary by features and pixels."""
    if len(bank.pooled) < 2:
        return None, {"note": "not measured: the reference holds statistics and no pictures"}
    by_features = neighbours(samples.pooled, bank.pooled)
    by_pixels = neighbours(samples.pixels, bank.pixels)
    return by_features, {"features": by_features.summary(), "pixels": by_pixels.summary()}


def _shuffled(features: Tensor, protocol: Protocol) -> Tensor:
    """The rows in an order of the protocol's seed."""
    order = Draws(protocol.seed).permutation("evaluation/split", len(features), 0)
    return features[torch.from_numpy(order).to(features.device)]


def _versions() -> dict[str, str]:
    """Of everything that the numbers may depend on and that is installed."""
    found = {"untwine": untwine.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
