"""Images of a Hugging Face data set that lies on disk; nothing is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from untwine.data.base import CorruptImage, Dataset
from untwine.data.images import Preparation, decode
from untwine.diffusion.draws import Draws

_LABELS, _CAPTIONS = ("label", "labels", "class"), ("caption", "text", "prompt")


class HuggingFace(Dataset):
    """A folder written by ``save_to_disk``, an ``imagefolder``, or a folder (or file) of parquet.

    Images are decoded by the rule of :mod:`untwine.data.images`, not by ``datasets``. Parquet files and image folders
    are indexed in the cache of ``datasets`` (``HF_DATASETS_CACHE``) at the first use.

    Args:
        root: folder, or a ``.parquet`` file.
        resolution: side of the square samples in pixels.
        part: which split, where there are several.
        image: name of the column of images; default: the only one.
        label: name of a column of class labels: ``ClassLabel``, integers 0..n-1, or texts, whose sorted values are the
            classes; default: the only ``ClassLabel`` column, or one called label, labels or class.
        caption: name of a column of texts; default: one called caption, text or prompt.
        channels: 3 (RGB) or 1 (grey).
        flip: mirror half of the samples (in training only).
        crop: "center", or "random": a square of at least 0.8 of the short side (in training only).
        max_corrupt: fraction of unreadable images above which training stops.

    Raises:
        ImportError: without the package ``datasets``.
        ValueError: for a folder of another kind, a column that does not exist or does not fit.
    """

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        *,
        part: str = "train",
        image: str | None = None,
        label: str | None = None,
        caption: str | None = None,
        channels: Literal[1, 3] = 3,
        flip: bool = False,
        crop: Literal["center", "random"] = "center",
        max_corrupt: float = 0.01,
    ) -> None:
        self.root = Path(root)
        if not 0 <= max_corrupt <= 1:
            raise ValueError(f"max_corrupt must be within [0, 1], got {max_corrupt}")
        self.prepare = Preparation(resolution, channels, crop, flip)
        self.flip, self.crop, self.max_corrupt = flip, crop, max_corrupt
        self.sample_shape = (channels, resolution, resolution)
        table = _open(self.root, part)
        self.image = self._column(table, image, "image", _images(table))
        self.table = _undecoded(table, self.image)
        labels = _class_labels(table) or [name for name in _LABELS if name in table.column_names]
        if name := self._optional(table, label, "label", labels):
            self._read_labels(table, name)
        if name := self._optional(table, caption, "caption", [n for n in _CAPTIONS if n in table.column_names]):
            self.captions = [str(text) for text in table[name]]

    def __len__(self) -> int:
        return len(self.table)

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        name = f"row {position} of {self.root}"
        try:
            return self.prepare(decode(self._bytes(position), self.prepare.channels, name=name), draws, index)
        except CorruptImage as error:
            raise error if name in str(error) else CorruptImage(f"{name}: {error}") from error

    def fingerprint(self) -> dict[str, Any]:
        sampled = np.unique(np.linspace(0, len(self) - 1, 16).astype(int))
        hashes = [self._hash(int(i)) for i in sampled]
        told = repr((None if self.labels is None else self.labels.tolist(), self.captions)).encode()
        return {"count": len(self), "labels": hashlib.sha256(told).hexdigest(), "sha256": hashes}

    def _bytes(self, position: int) -> bytes:
        """The content of an image file; empty where there is none."""
        entry = self.table[position][self.image] or {}
        if entry.get("bytes") is not None:
            return entry["bytes"]
        try:
            return Path(entry["path"]).read_bytes() if entry.get("path") else b""
        except OSError as error:
            raise CorruptImage(f"row {position} of {self.root}: {error}") from error

    def _hash(self, position: int) -> str:
        try:
            return hashlib.sha256(self._bytes(position)).hexdigest()
        except CorruptImage:
            return "unreadable"

    def _read_labels(self, table: Any, name: str) -> None:
        feature, values = table.features[name], table[name][:]
        if hasattr(feature, "names"):
            names = [str(n) for n in feature.names]
        elif values and isinstance(values[0], str):
            names = sorted(set(values))
            values = [names.index(value) for value in values]
        else:
            whole = all(type(value) is int and value >= 0 for value in values)
            names = [str(i) for i in range(max(values) + 1)] if whole else []
        if not names or any(value is None or not 0 <= value < len(names) for value in values):
            raise ValueError(f"label: column {name!r} of {self.root} must hold a class for every row")
        self.labels, self.num_classes, self.class_names = np.array(values, np.int64), len(names), tuple(names)

    def _column(self, table: Any, given: str | None, option: str, found: list[str]) -> str:
        name = given or (found[0] if len(found) == 1 else None)
        if name is None or name not in table.column_names:
            problem = f"there is no column {given!r}" if given else f"{len(found)} columns could be it"
            raise ValueError(f"{option}: {problem} in {self.root}; its columns are {', '.join(table.column_names)}")
        return name

    def _optional(self, table: Any, given: str | None, option: str, found: list[str]) -> str | None:
        return self._column(table, given, option, found) if given or found else None


def _open(root: Path, part: str) -> Any:
    """One table of ``datasets``, from whichever of the three forms lies at ``root``."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data of kind hf are read by the package datasets: pip install untwine[data]") from error
    parquet = [root] if root.suffix == ".parquet" and root.is_file() else sorted(root.rglob("*.parquet"))
    if not parquet and not (root.is_dir() and any(root.iterdir())):
        raise ValueError(f"root must be a folder of save_to_disk, images or parquet files, got {str(root)!r}")
    try:
        if parquet:
            found = datasets.load_dataset("parquet", data_files=_parts(parquet, part))
        elif any((root / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(root))
        else:
            found = datasets.load_dataset("imagefolder", data_dir=str(root))
    except Exception as error:  # whatever it raises on damaged and on empty files
        raise ValueError(f"root: {root} cannot be read by datasets: {str(error).splitlines()[0]}") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if part not in found:
        raise ValueError(f"part: {root} has no {part!r}; it has {', '.join(map(str, found))}")
    return found[part]


def _parts(files: list[Path], part: str) -> dict[str, list[str]]:
    """Parquet files by part, as ``train-00000-of-00002.parquet`` tells it; without such names all are one part."""
    parts: dict[str, list[str]] = {}
    for file in files:
        parts.setdefault(file.stem.partition("-")[0], []).append(str(file))
    return parts if {"train", "test", "validation", part} & {*parts} else {part: [str(file) for file in files]}


def _images(table: Any) -> list[str]:
    """Columns of images, and of the plain ``{bytes, path}`` structs they become in parquet."""
    import datasets

    def is_image(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {*feature} == {"bytes", "path"})

    return [name for name, feature in table.features.items() if is_image(feature)]


def _class_labels(table: Any) -> list[str]:
    import datasets

    return [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]


def _undecoded(table: Any, image: str) -> Any:
    """The image column alone, as bytes or paths."""
    import datasets

    return table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
