"""Samples as files: pictures that carry their seed and settings, a grid, an ``.npz`` in ADM's layout and a report."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from untwine.pipelines.image import to_pil
from untwine.pipelines.loading import Samples

_PICTURE = re.compile(r"\d{6,}\.png")


def prepare_folder(folder: Path) -> Path:
    """Creates the output folder, and fails before anything is computed where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder}: {error.strerror}; choose a writable folder") from error
    return folder


def make_grid(images: np.ndarray, *, columns: int | None = None, scale: int = 1, gap: int = 2) -> Image.Image:
    """(N, H, W, C) uint8 images row by row on a light ground, each enlarged ``scale`` times without smoothing."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 230, np.uint8)
    for k, image in enumerate(large):
        top, left = gap + (k // columns) * (height + gap), gap + (k % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return to_pil(sheet)


def save_samples(samples: Samples, folder: Path, *, columns: int | None = None, pictures: bool = True) -> None:
    """Writes ``000000.png`` ..., ``grid.png``, ``samples.npz`` (arr_0 images, arr_1 labels) and ``report.json``.

    Files of an earlier set in the same folder are replaced, so that what lies there is one set; the report comes last.
    Latents without a codec make no pictures.
    """
    _remove_earlier(folder)
    if samples.are_pictures:
        digits = max(6, len(str(len(samples.images))))
        for k, image in enumerate(samples.images if pictures else ()):
            to_pil(image).save(folder / f"{k:0{digits}d}.png", pnginfo=_metadata(samples, k))
        scale = max(1, 32 // samples.images.shape[1])
        make_grid(samples.images[:400], columns=columns, scale=scale).save(folder / "grid.png")
    arrays: dict[str, Any] = {"arr_0": samples.images} | ({} if samples.labels is None else {"arr_1": samples.labels})
    np.savez(folder / "samples.npz", **arrays)
    (folder / "report.json").write_text(json.dumps(samples.report, indent=2) + "\n", encoding="utf-8")


def _remove_earlier(folder: Path) -> None:
    """Removes what :func:`save_samples` wrote here before, and nothing in a folder without its report."""
    report = folder / "report.json"
    if not report.is_file():
        return
    for file in folder.iterdir():
        if _PICTURE.fullmatch(file.name) or file.name in ("grid.png", "samples.npz"):
            file.unlink()
    report.unlink()


def _metadata(samples: Samples, k: int) -> PngInfo:
    info = PngInfo()
    told = {"seed": samples.report["seed"], "image": k, "sampling": samples.report["sampling"]}
    if samples.labels is not None:
        told["label"] = int(samples.labels[k])
    if samples.prompts is not None:
        told["prompt"] = samples.prompts[k]
    info.add_text("untwine", json.dumps({**told, "origin": samples.report["origin"]}))
    return info
