"""From pictures to a report in files: JSON, and the samples nearest to real pictures above what they resemble."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from untwine.data.base import Dataset
from untwine.encoders.base import Encoder
from untwine.evaluation.evaluator import Evaluator, Report
from untwine.evaluation.pictures import Pictures, from_array, open_samples
from untwine.evaluation.protocols import DEFAULT, Protocol
from untwine.evaluation.references import Reference
from untwine.evaluation.statistics import process

COLUMNS = 10


def evaluate(
    samples: str | Path | np.ndarray | Pictures,
    reference: str | Path | Dataset | Reference,
    protocol: str | Protocol = DEFAULT,
    *,
    out: Path | None = None,
    encoder: Encoder | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    cache: Path | None = None,
    facts: dict[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Report:
    """Compares samples with a reference by a protocol; collective, each process encodes its share of the samples.

    Args:
        samples: a folder of pictures, an ``.npz`` with ``arr_0``, or (N, H, W, C) uint8 levels.
        reference: whatever :func:`~untwine.evaluation.references.open_reference` takes.
        out: folder for ``evaluation.json`` and ``nearest.png``.
        encoder: instead of the protocol's, which then names it.
        cache: folder that keeps the features of references.
        facts: what else the report shall say of the samples, such as the checkpoint they come from.
        on_batch: hears, in the first process, how many samples are encoded.

    Raises:
        ValueError: for samples, a reference or a protocol that cannot be used; nothing is written then.
    """
    pictures = _open(samples)
    evaluator = Evaluator(reference, protocol, encoder=encoder, device=device, batch_size=batch_size, cache=cache)
    count = evaluator.protocol.num_samples
    if pictures.count < count:
        raise ValueError(
            f"samples: {pictures.source} holds {pictures.count} pictures, and protocol {evaluator.protocol.name} "
            f"compares {count}; give more, or set num_samples (the result then says so)"
        )
    real = evaluator.reference.pictures(pictures.size)  # another size is refused before anything is encoded
    rank, world_size = process()
    mine = torch.arange(rank, count, world_size)
    for part, images in zip(mine.split(batch_size), pictures.batches(mine.tolist(), batch_size)):
        evaluator.update(images, part)
        if on_batch is not None and rank == 0:
            on_batch(min(count, int(part[-1]) + world_size))
    report = evaluator.result()
    report.values["samples"] = {"source": pictures.source, **pictures.fingerprint(), **(facts or {})}
    if out is not None and rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if real is not None and report.nearest is not None:
            nearest_pairs(report, pictures, real).save(out / "nearest.png")
        (out / "evaluation.json").write_text(json.dumps(report.values, indent=2) + "\n", encoding="utf-8")
    return report


def _open(samples: str | Path | np.ndarray | Pictures) -> Pictures:
    if isinstance(samples, Pictures):
        return samples
    return from_array(samples) if isinstance(samples, np.ndarray) else open_samples(Path(samples))


def nearest_pairs(report: Report, samples: Pictures, reference: Pictures, *, columns: int = COLUMNS) -> Image.Image:
    """The samples nearest to the reference, the nearest first, each above the picture it is nearest to."""
    if report.nearest is None:
        raise ValueError("report: the reference holds no pictures to show")
    order: Tensor = report.nearest.ratio.argsort()[:columns]
    pairs = [
        (samples.read(k), reference.read(position))
        for k, position in zip(order.tolist(), report.nearest.position[order].tolist())
    ]
    height, width = samples.size
    scale, gap = max(1, 64 // height), 2
    sheet = np.full((2 * height * scale + 3 * gap, len(pairs) * (width * scale + gap) + gap, 3), 230, np.uint8)
    for column, pair in enumerate(pairs):
        for row, picture in enumerate(pair):
            top, left = gap + row * (height * scale + gap), gap + column * (width * scale + gap)
            large = picture.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet[top : top + large.shape[0], left : left + large.shape[1]] = large  # grey fills three channels
    return Image.fromarray(sheet)
