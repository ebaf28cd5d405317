"""Images in a folder: without classes, one folder a class, or with captions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from untwine.data.base import CorruptImage, Dataset
from untwine.data.images import Preparation, decode
from untwine.diffusion.draws import Draws

logger = logging.getLogger(__name__)
EXTENSIONS = frozenset(
    [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"]
)


class ImageFolder(Dataset):
    """Every image under ``root``, in the order of its relative path.

    Other files, hidden ones and broken links are ignored and counted in ``num_ignored``; linked folders are followed,
    but not in circles.

    Args:
        root: the folder.
        resolution: side of the square samples in pixels.
        channels: 3 (RGB) or 1 (grey).
        layout: "flat" (no labels); "classes" (the folders in ``root``, sorted by name, are the classes; an empty one
            keeps its label id); "captions" (``x.txt`` beside ``x.png``, or ``metadata.jsonl`` in ``root`` with
            ``{"file_name": ..., "text": ...}`` lines, one for every image); "auto": captions if there are any, else
            classes if all images lie in folders of ``root``, else flat.
        on_small: "upscale" images smaller than ``resolution`` with one warning, or "refuse" them; refusing opens the
            header of every file at the start.
        flip: mirror half of the samples (in training only).
        crop: "center", or "random": a square of at least 0.8 of the short side (in training only).
        max_corrupt: fraction of unreadable images above which training stops.

    Raises:
        ValueError: for a folder without images or that does not fit its layout, and for bad options.
    """

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        *,
        channels: Literal[1, 3] = 3,
        layout: Literal["auto", "flat", "classes", "captions"] = "auto",
        on_small: Literal["upscale", "refuse"] = "upscale",
        flip: bool = False,
        crop: Literal["center", "random"] = "center",
        max_corrupt: float = 0.01,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"root must be an existing folder, got {str(root)!r}")
        if resolution < 1 or not 0 <= max_corrupt <= 1:
            raise ValueError(
                f"resolution must be at least 1 and max_corrupt in [0, 1], got {resolution} and {max_corrupt}"
            )
        self.resolution, self.channels, self.flip, self.crop = resolution, channels, flip, crop
        self.prepare = Preparation(resolution, channels, crop, flip)
        self.max_corrupt, self.sample_shape = max_corrupt, (channels, resolution, resolution)
        self.files, self.num_ignored = _scan(self.root)
        if not self.files:
            known = " ".join(sorted(EXTENSIONS))
            raise ValueError(
                f"root has no images: {str(root)!r} ({self.num_ignored} other files; images end in {known})"
            )
        self.names = self.files
        self.layout = self._detect() if layout == "auto" else layout
        if self.layout == "classes":
            self._read_classes()
        elif self.layout == "captions":
            self.captions = self._read_captions()
        if on_small == "refuse":
            self._refuse_small()
        self._warned_small = False
        logger.info("%s: %d images, layout %s, %d other files", root, len(self), self.layout, self.num_ignored)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        path = self.root / self.files[position]
        image = decode(path, self.channels)
        if min(image.size) < self.resolution and not self._warned_small:
            self._warned_small = True
            logger.warning("images smaller than %d are upscaled, the first: %s", self.resolution, path)
        try:
            return self.prepare(image, draws, index)
        except CorruptImage as error:
            raise CorruptImage(f"{path}: {error}") from error

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_of(self.root, self.files)

    def _detect(self) -> Literal["flat", "classes", "captions"]:
        if (self.root / "metadata.jsonl").is_file() or any(self._caption_file(name).is_file() for name in self.files):
            return "captions"
        outside = [name for name in self.files if "/" not in name]
        if outside and len(outside) < len(self):
            logger.warning("%s has images both in folders and beside them: read without classes", self.root)
        return "flat" if outside else "classes"

    def _read_classes(self) -> None:
        outside = [name for name in self.files if "/" not in name]
        if outside:
            raise ValueError(f"layout 'classes': images in no class folder: {_some(outside)}; move them or use 'flat'")
        names = sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        ids = {name: i for i, name in enumerate(names)}
        self.class_names, self.num_classes = tuple(names), len(names)
        self.labels = np.array([ids[name.partition("/")[0]] for name in self.files], np.int64)
        empty = [name for name, count in zip(names, np.bincount(self.labels, minlength=len(names))) if not count]
        if empty:
            logger.warning("class folders without images: %s; the other classes keep their label ids", _some(empty))

    def _read_captions(self) -> list[str]:
        """One caption for every image, paired by name, never by position."""
        table = self.root / "metadata.jsonl"
        if table.is_file():
            captions = _read_table(table)
        else:
            beside = {name: self._caption_file(name) for name in self.files}
            captions = {name: _read_text(path).strip() for name, path in beside.items() if path.is_file()}
        missing, extra = sorted(set(self.files) - set(captions)), sorted(set(captions) - set(self.files))
        if missing or extra:
            raise ValueError(
                f"layout 'captions': {len(missing)} images have no caption ({_some(missing)}), {len(extra)} captions "
                f"have no image ({_some(extra)}); complete them, or use layout='flat'"
            )
        return [captions[name] for name in self.files]

    def _caption_file(self, name: str) -> Path:
        return (self.root / name).with_suffix(".txt")

    def _refuse_small(self) -> None:
        small = [name for name in self.files if _short_side(self.root / name) < self.resolution]
        if small:
            raise ValueError(
                f"{len(small)} images are smaller than resolution = {self.resolution} ({_some(small)}); remove them, "
                "lower the resolution, or use on_small='upscale'"
            )


def fingerprint_of(root: Path, files: list[str]) -> dict[str, Any]:
    """Count, bytes, a hash of the names, and hashes of 16 of the files."""
    names = hashlib.sha256("\0".join(files).encode(errors="surrogateescape"))
    total = sum((root / name).stat().st_size for name in files)
    sampled = np.unique(np.linspace(0, len(files) - 1, 16).astype(int))
    hashes = [hashlib.sha256((root / files[i]).read_bytes()).hexdigest() for i in sampled]
    return {"count": len(files), "bytes": total, "names": names.hexdigest(), "sha256": hashes}


def _scan(root: Path) -> tuple[list[str], int]:
    """(relative paths of the images with '/' separators, sorted; number of other files)."""
    files, ignored = [], 0
    for path in _walk(root, set()):
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file():
            files.append(name)
        else:
            ignored += 1
    return sorted(files), ignored


def _walk(folder: Path, above: set[tuple[int, int]]) -> Iterator[Path]:
    """Files below a folder; links are followed, except to a folder that is being walked already."""
    try:
        status = folder.stat()
        key = (status.st_dev, status.st_ino)
        if key in above:
            logger.warning("%s links to a folder above it: not followed", folder)
            return
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        logger.warning("cannot read folder %s: %s", folder, error)
        return
    for entry in entries:
        if not entry.is_dir():
            yield Path(entry.path)
        elif not entry.name.startswith("."):
            yield from _walk(Path(entry.path), above | {key})


def _read_table(path: Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number}: expected {{'file_name': ..., 'text': ...}}: {error}") from error
        if not isinstance(text, str) or name in captions:
            raise ValueError(f"{path}: line {number}: {name!r} needs one text, given once, got {text!r}")
        captions[name] = text
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: captions must be UTF-8 text: {error}") from error


def _short_side(path: Path) -> float:
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception:  # damaged files are found and counted when they are read
        return float("inf")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
