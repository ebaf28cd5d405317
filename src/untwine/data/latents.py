"""A cache of latents: what the codec of a recipe made of a data set, once, instead of at every step.

A folder of ``manifest.json`` and safetensors shards. A shard holds, for consecutive samples of the source, ``moments``
(n, V, M, *latent) with V = 2 where mirrored samples are kept as well and M = 2 (normalised posterior mean and
deviation; M = 1 for a deterministic codec), ``position`` in the source, ``crc32`` of each row, ``label`` and ``group``
where the source has them, and names and captions in its metadata. Training draws a fresh sample of the posterior each
time, as the codec itself would: a run from the cache sees the latents that a run from the pictures sees.
"""

from __future__ import annotations

import json
import reprlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from untwine.codecs.base import Codec, warn_unless_unit
from untwine.codecs.moments import Moments
from untwine.data.base import Dataset
from untwine.data.images import mirrored
from untwine.diffusion.draws import Draws

MANIFEST, FORMAT = "manifest.json", "untwine-latents-1"


class LatentsError(RuntimeError):
    """A cache of latents that is damaged or incomplete; the message names the file."""


class Latents(Dataset):
    """The cache in a folder that ``untwine data encode RECIPE --out FOLDER`` made.

    A recipe over it names the codec that made it, for decoding; :meth:`bind` refuses any other. Mirroring follows the
    source: where it flips samples, the cache holds both sides.

    Raises:
        LatentsError: for a folder that is no complete cache, and while reading for a row that has been damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        shards = self.manifest["shards"]
        if "statistics" not in self.manifest:
            raise LatentsError(
                f"{self.root} is incomplete ({sum(map(bool, shards))} shards so far); run the same untwine data encode "
                "again"
            )
        for shard in shards:
            check_shard(self.root, shard)
        self.starts = np.cumsum([0, *(shard["count"] for shard in shards)])
        self.class_names, self.num_classes = tuple(self.manifest["class_names"]), self.manifest["num_classes"]
        self.labels, self.groups = self._joined("label"), self._joined("group")
        self.names, self.captions = self._told("names"), self._told("captions")
        channels, *grid = self.manifest["latent_shape"]
        self.sample_shape = (channels * (1 + self.manifest["stochastic"]), *grid)
        warn_unless_unit(self.manifest["statistics"]["overall_std"], f"the latents in {self.root}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        """Mean and deviation of the posterior, one after the other as channels: what :meth:`bind`'s codec takes."""
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        path, row = self.root / self.manifest["shards"][shard]["file"], position - int(self.starts[shard])
        try:
            with safetensors.safe_open(path, "pt") as file:
                moments = file.get_slice("moments")[row : row + 1]
                expected = int(file.get_slice("crc32")[row : row + 1])
        except (OSError, safetensors.SafetensorError) as error:
            raise LatentsError(f"{path} cannot be read: {error}") from error
        if checksum(moments[0]) != expected:
            raise LatentsError(f"{path} is damaged at row {row}: remove it and run the same untwine data encode again")
        side = int(self.manifest["flips"] and mirrored(draws, index))
        return moments[0, side].flatten(0, 1).float()

    def bind(self, codec: Codec) -> Codec:
        """Draws from the stored posteriors, and decodes with ``codec``.

        Raises:
            ValueError: if ``codec`` is not the one that made the cache; the message names what differs.
        """
        made, given = self.manifest["codec"], codec.fingerprint()
        if changed := differing(made, given):
            raise ValueError(
                f"data.root {self.root} was encoded by another codec than recipe.codec, which differs in "
                f"{'; '.join(changed)}. Encode again, or use the one it was made with: {self.manifest['made_by']}"
            )
        return Moments(codec, self.manifest["stochastic"])

    def fingerprint(self) -> dict[str, Any]:
        facts = ("codec", "dtype", "source", "flips")
        return {"count": len(self), **{fact: self.manifest[fact] for fact in facts}}

    def _joined(self, name: str) -> np.ndarray | None:
        parts = [part for shard in self.manifest["shards"] if (part := self._column(shard, name)) is not None]
        return np.concatenate(parts) if parts else None

    def _column(self, shard: dict[str, Any], name: str) -> np.ndarray | None:
        with safetensors.safe_open(self.root / shard["file"], "pt") as file:
            return file.get_tensor(name).numpy() if name in file.keys() else None  # noqa: SIM118 - no mapping

    def _told(self, name: str) -> list[str] | None:
        parts = [told[name] for shard in self.manifest["shards"] if name in (told := read_told(self.root, shard))]
        return [text for part in parts for text in part] if parts else None


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a cache, complete or not."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or not isinstance(manifest["shards"], list):
            raise ValueError(f"not in the format {FORMAT}")
    except FileNotFoundError as error:
        raise LatentsError(
            f"{root} holds no cache of latents (no {MANIFEST}); make one: untwine data encode RECIPE --out {root}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LatentsError(f"{path} is damaged: {error}") from error
    return manifest


def check_shard(root: Path, shard: dict[str, Any]) -> None:
    """Refuses a shard that is missing or has another size or header than when it was written."""
    path = root / shard["file"]
    try:
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise LatentsError(f"{path}: expected {shard['bytes']} bytes, found {size}; {_REPAIR}")
        with safetensors.safe_open(path, "pt") as file:
            rows = file.get_slice("moments").get_shape()[0]
    except FileNotFoundError as error:
        raise LatentsError(f"{path} is missing; {_REPAIR}") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise LatentsError(f"{path} cannot be read: {error}; {_REPAIR}") from error
    if rows != shard["count"]:
        raise LatentsError(f"{path} holds {rows} samples, the manifest says {shard['count']}; {_REPAIR}")


_REPAIR = "run the same untwine data encode again, which makes it anew"


def read_told(root: Path, shard: dict[str, Any]) -> dict[str, list[str]]:
    """The lists of texts (names, captions) in a shard's metadata."""
    with safetensors.safe_open(root / shard["file"], "pt") as file:
        return {name: json.loads(text) for name, text in (file.metadata() or {}).items()}


def checksum(moments: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(moments.contiguous().view(torch.uint8).numpy().tobytes())


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``field: old -> new`` for every field in which two descriptions differ; long values are cut."""
    found = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{difference}" for difference in differing(a, b)]
        elif a != b:
            found.append(f"{key}: {reprlib.repr(a)} -> {reprlib.repr(b)}")
    return found
