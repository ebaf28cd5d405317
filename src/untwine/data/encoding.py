"""Making a cache of latents: shard after shard, each whole or absent, so that a broken-off run can go on."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from untwine.codecs.base import Codec, warn_unless_unit
from untwine.data.base import CorruptImage, Dataset
from untwine.data.buckets import Buckets
from untwine.data.latents import (
    FORMAT,
    MANIFEST,
    LatentsError,
    check_shard,
    checksum,
    differing,
    read_manifest,
    read_told,
)

logger = logging.getLogger(__name__)
Together = Callable[[Callable[[], Any]], list[Any]]
_FACTS = ("codec", "dtype", "sample_shape", "crop", "flips", "class_names", "shard_size", "source")


@dataclass(frozen=True)
class Estimate:
    """What making the cache costs."""

    samples: int
    num_bytes: int
    seconds: float
    """for all samples, from one batch"""


class Encoder:
    """Encodes a data set into a folder that :class:`~untwine.data.latents.Latents` reads.

    Args:
        dataset: read without augmentation; where it flips samples, both sides are encoded.
        codec: in this process, on ``device``.
        out: the folder. A broken-off run of the same settings goes on, and damaged or missing shards are made anew.
        made_by: how a recipe writes the codec, for messages.
        dtype: of the stored moments.
        batch_size: samples encoded at once.
        shard_size: samples in a file.

    Raises:
        ValueError: for random crops and buckets (a cache holds one crop of one shape), or a folder that holds another
            cache.
    """

    def __init__(
        self,
        dataset: Dataset,
        codec: Codec,
        out: str | Path,
        *,
        made_by: dict[str, Any] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 32,
        shard_size: int = 4096,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(batch_size, shard_size) < 1:
            raise ValueError(f"batch_size and shard_size must be >= 1, got {batch_size} and {shard_size}")
        if dataset.crop != "center":
            raise ValueError(
                f"data.crop is {dataset.crop!r}, and a cache holds one crop of each sample: set data.crop to center"
            )
        if isinstance(dataset, Buckets):
            raise ValueError("data of kind buckets has several shapes, and a cache holds one: train from the pictures")
        self.dataset, self.codec, self.out, self.device = dataset, codec, Path(out), torch.device(device)
        self.batch_size, self.shard_size, self.dtype = batch_size, shard_size, getattr(torch, dtype)
        self.flips = dataset.flip
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "codec": codec.fingerprint(),
            "made_by": made_by or {},
            "dtype": dtype,
            "sample_shape": list(dataset.sample_shape),
            "crop": dataset.crop,
            "flips": self.flips,
            "latent_shape": list(codec.latent_shape(dataset.sample_shape)),
            "num_classes": dataset.num_classes,
            "class_names": list(dataset.class_names),
            "shard_size": shard_size,
            "source": dataset.fingerprint(),
            "skipped": {},
            "shards": [],
        }
        self._continue()

    def estimate(self) -> Estimate:
        """Size and time, from a batch that is encoded twice: the first time reads weights and warms up."""
        positions = range(min(self.batch_size, len(self.dataset)))
        moments = self._encode(positions)[0]
        started = time.perf_counter()
        self._encode(positions)
        rate = (time.perf_counter() - started) / len(positions)
        row = math.prod(moments.shape[1:]) * self.dtype.itemsize
        return Estimate(len(self.dataset), row * len(self.dataset), rate * len(self.dataset))

    def run(
        self,
        on_samples: Callable[[int], None] | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        together: Together = lambda fn: [fn()],
    ) -> dict[str, Any]:
        """Encodes what is missing; the manifest of the complete cache.

        Processes share the work shard by shard, in rounds, and leave the files that one process would: a shard is
        encoded in the same batches whoever makes it. Rank 0 writes the manifest after each round, so that a broken-off
        run has lost no more than one.

        Args:
            on_samples: hears how many are done.
            together: runs a function on every process and returns all results by rank, or raises on every process
                what one of them has raised.
        """
        self._on_main(rank, together, self._check_space)
        shards = self.manifest["shards"]
        shards += [None] * (-(-len(self.dataset) // self.shard_size) - len(shards))
        missing = [number for number, shard in enumerate(shards) if shard is None]
        for first in range(0, len(missing), world_size):
            numbers = missing[first : first + world_size]
            made = together(partial(self._make, numbers[rank] if rank < len(numbers) else None))
            for number, (shard, skipped) in zip(numbers, made):
                shards[number] = shard
                self.manifest["skipped"] |= skipped
            self._check_skipped()
            self._on_main(rank, together, self._write_manifest)
            if on_samples is not None:
                on_samples(self._positions(numbers[-1]).stop)
        if "statistics" not in self.manifest:
            self.manifest["statistics"] = _statistics(shards)
            self._on_main(rank, together, self._finish)
        return self.manifest

    def _on_main(self, rank: int, together: Together, fn: Callable[[], Any]) -> None:
        together(fn if rank == 0 else lambda: None)

    def _finish(self) -> None:
        self._write_manifest()
        warn_unless_unit(self.manifest["statistics"]["overall_std"], f"the latents in {self.out}")

    def _continue(self) -> None:
        """Takes over the shards of an earlier run with the same settings; None stands for one to be made anew."""
        if not (self.out / MANIFEST).is_file():
            ours = (".", "run.lock", "latents-")
            if self.out.is_dir() and not all(entry.name.startswith(ours) for entry in self.out.iterdir()):
                raise ValueError(f"out: {self.out} holds other files; choose an empty or a new folder")
            return
        old = read_manifest(self.out)
        if changed := differing({k: old.get(k) for k in _FACTS}, {k: self.manifest[k] for k in _FACTS}):
            names = self._renamed(old["shards"]) if old.get("source") != self.manifest["source"] else ""
            raise ValueError(f"out: {self.out} holds a cache of other data or settings: {'; '.join(changed)}{names}")
        self.manifest = old
        for number, shard in enumerate(old["shards"]):
            if shard is None:
                continue
            try:
                check_shard(self.out, shard)
            except LatentsError as error:
                logger.warning("%s", error)
                old["shards"][number] = None
                old.pop("statistics", None)

    def _renamed(self, shards: list[dict[str, Any]]) -> str:
        """The names that only the cache, or only the data, has; names are compared, never positions."""
        stored = {name for shard in shards if shard for name in read_told(self.out, shard).get("names", [])}
        now = set(self.dataset.names or ())
        gone, new = sorted(stored - now)[:5], sorted(now - stored)[:5]
        return f" (gone: {', '.join(gone) or 'none'}; new: {', '.join(new) or 'none'})" if stored and now else ""

    def _check_space(self) -> None:
        """Refuses a disk with less space than the missing shards take, by the shape of the latents."""
        self.out.mkdir(parents=True, exist_ok=True)
        variants = (1 + self.manifest.get("stochastic", True)) * (1 + self.flips)
        row = variants * math.prod(self.manifest["latent_shape"]) * self.dtype.itemsize
        done = sum(shard["count"] for shard in self.manifest["shards"] if shard)
        free, needed = shutil.disk_usage(self.out).free, row * (len(self.dataset) - done)
        if needed > free:
            raise LatentsError(f"{self.out}: {needed} bytes are needed for the cache, {free} are free")

    def _positions(self, number: int) -> range:
        """Of the samples in shard ``number``."""
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, len(self.dataset)))

    def _make(self, number: int | None) -> tuple[dict[str, Any], dict[str, str]]:
        """What the manifest says of a shard, and of the samples left out of it; None makes none."""
        if number is None:
            return {}, {}
        positions, count = self._positions(number), len(self.manifest["shards"])
        shard = self._make_shard(f"latents-{number:05d}-of-{count:05d}.safetensors", positions)
        return shard, {k: why for k, why in self.manifest["skipped"].items() if int(k) in positions}

    def _make_shard(self, name: str, positions: range) -> dict[str, Any]:
        parts = [self._encode(positions[i : i + self.batch_size]) for i in range(0, len(positions), self.batch_size)]
        moments = torch.cat([part for part, _ in parts])
        kept = [position for _, read in parts for position in read]
        if not kept:
            raise CorruptImage(f"none of the samples {positions[0]} to {positions[-1]} can be read")
        tensors = {
            "moments": moments.to(self.dtype),
            "position": torch.tensor(kept, dtype=torch.int64),
        }
        tensors["crc32"] = torch.tensor([checksum(row) for row in tensors["moments"]], dtype=torch.int64)
        for column, values in (("label", self.dataset.labels), ("group", self.dataset.groups)):
            if values is not None:
                tensors[column] = torch.from_numpy(np.asarray(values)[kept])
        texts = {"names": self.dataset.names, "captions": self.dataset.captions}
        told = {key: json.dumps([values[p] for p in kept]) for key, values in texts.items() if values is not None}
        _commit(self.out / name, lambda path: save_file(tensors, path, metadata=told))
        size = (self.out / name).stat().st_size
        return {"file": name, "count": len(kept), "bytes": size, **_sums(moments)}

    @torch.no_grad()
    def _encode(self, positions: range) -> tuple[Tensor, list[int]]:
        """(moments (n, V, M, *latent) float32, the positions that could be read)."""
        samples, kept = [], []
        for position in positions:
            try:
                samples.append(self.dataset.read(position))
                kept.append(position)
            except CorruptImage as error:
                self._skip(position, str(error))
        if not samples:
            return torch.empty(0), kept
        x = torch.stack(samples).to(self.device)
        encodings = [self.codec.encode(side) for side in ([x, x.flip(-1)] if self.flips else [x])]
        sides = [torch.stack([e.mean] if e.std is None else [e.mean, e.std], dim=1) for e in encodings]
        moments = torch.stack(sides, dim=1).float().cpu()
        self.manifest["stochastic"] = encodings[0].std is not None
        return moments, kept

    def _skip(self, position: int, reason: str) -> None:
        skipped = self.manifest["skipped"]
        if str(position) not in skipped:
            logger.warning("corrupt sample left out: %s", reason)
        skipped[str(position)] = reason
        self._check_skipped()

    def _check_skipped(self) -> None:
        """Stops above the fraction of corrupt samples that the data set allows, wherever they were found."""
        skipped = self.manifest["skipped"] = dict(sorted(self.manifest["skipped"].items(), key=lambda kv: int(kv[0])))
        if len(skipped) > self.dataset.max_corrupt * len(self.dataset):
            listed = "\n  ".join(list(skipped.values())[:20])
            raise CorruptImage(
                f"{len(skipped)} of {len(self.dataset)} samples are corrupt, more than max_corrupt = "
                f"{self.dataset.max_corrupt} allows; repair or remove them:\n  {listed}"
            )

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1)
        _commit(self.out / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def _commit(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name, flushes it, and renames it: it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    for entry in (temporary, path.parent):
        if entry == path.parent:
            temporary.replace(path)
        handle = os.open(entry, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _sums(moments: Tensor) -> dict[str, list[float]]:
    """Per channel, the sum over samples of the mean over pixels of ``E[z]`` and ``E[z^2]`` under the posterior."""
    mean = moments[:, :, 0].double()
    square = mean.square() + (moments[:, :, 1].double().square() if moments.shape[2] == 2 else 0)
    rest = [1, *range(3, mean.ndim)]
    return {"sum": mean.mean(rest).sum(0).tolist(), "square": square.mean(rest).sum(0).tolist()}


def _statistics(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of the latents, per channel and overall."""
    count = sum(shard["count"] for shard in shards)
    mean, square = (np.sum([shard[key] for shard in shards], axis=0) / count for key in ("sum", "square"))
    overall = float(np.sqrt(square.mean() - mean.mean() ** 2))
    return {"mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist(), "overall_std": overall}
