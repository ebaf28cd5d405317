"""Samples as files: pictures that carry their seed and settings, a grid, an ``.npz`` in ADM's layout and a report.

:func:`draw_into` makes a series of any length in any number of processes. Each finished batch lies in ``parts`` until
all are there, so that the same command, in as many processes as one likes, goes on where an earlier one ended.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

from untwine.pipelines.image import to_pil
from untwine.pipelines.series import Drawn, Samples, Series
from untwine.training.distributed import on_main, rank, together, world_size
from untwine.training.locking import lock

logger = logging.getLogger(__name__)
_PICTURE = re.compile(r"\d{6,}\.png")
_PARTS, _REQUEST = "parts", "request.json"
_IN_GRID = 400


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
    if pictures and samples.are_pictures:
        every = range(len(samples.images))
        _write_pictures(folder, samples.images, every, samples.report, samples.labels, samples.prompts)
    _write_set(folder, [samples.images], len(samples.images), samples.labels, samples.report, columns)


def draw_into(
    folder: Path,
    series: Series,
    *,
    columns: int | None = None,
    pictures: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Draws a series into ``folder``, as :func:`save_samples` lays it out, and returns its report; collective.

    The batches that are still missing are shared out among the processes. At no time are more images in memory than
    one batch of each process and those of the grid.

    Args:
        on_batch: hears, in the first process, how many images are done.

    Raises:
        FolderInUse: where another live run draws into the folder.
    """
    started = time.perf_counter()
    with lock(folder):
        missing = on_main(lambda: _continue(folder, series))
        done = series.count - sum(len(series.images_of(batch)) for batch in missing)
        earlier = done

        def draw_mine() -> None:
            nonlocal done
            for k in range(rank(), len(missing), world_size()):
                _write_part(folder, series, missing[k], pictures)
                done += sum(len(series.images_of(batch)) for batch in missing[k - rank() : k - rank() + world_size()])
                if on_batch is not None and rank() == 0:
                    on_batch(done)

        together(draw_mine)

        def finish() -> dict[str, Any]:
            costs = [_cost(_part(folder, batch)) for batch in range(len(series))]
            evaluations, refreshes = (sum(column) for column in zip(*costs))
            report = series.report(evaluations, refreshes, time.perf_counter() - started)
            report |= {"processes": world_size()} | ({"drawn_earlier": earlier} if earlier else {})
            images = (load_file(_part(folder, batch))["images"] for batch in range(len(series)))
            _write_set(folder, images, series.count, series.labels, report, columns)
            shutil.rmtree(folder / _PARTS)
            return report

        return on_main(finish)


def _continue(folder: Path, series: Series) -> list[int]:
    """The batches that an earlier run of the same request has not finished; anything else of an earlier set goes."""
    parts, request = folder / _PARTS, json.loads(json.dumps({**series.told(), "labels": _listed(series.labels)}))
    try:
        same = json.loads((parts / _REQUEST).read_text(encoding="utf-8")) == request
    except (OSError, ValueError):
        same = False
    if not same:
        _remove_earlier(folder)
        if parts.is_dir():
            logger.warning("%s: the unfinished set there is of another request, and is replaced", folder)
            shutil.rmtree(parts)
        parts.mkdir()
        (parts / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
    return [batch for batch in range(len(series)) if not _is_whole(_part(folder, batch))]


def _listed(labels: np.ndarray | None) -> list[int] | None:
    return None if labels is None else labels.tolist()


def _part(folder: Path, batch: int) -> Path:
    return folder / _PARTS / f"{batch:06d}.safetensors"


def _is_whole(part: Path) -> bool:
    try:
        _cost(part)
    except (OSError, safetensors.SafetensorError):
        return False
    return True


def _cost(part: Path) -> tuple[int, int]:
    """(network evaluations, refreshes) of a finished batch."""
    with safetensors.safe_open(part, "np") as file:
        told = file.metadata()
    return int(told["evaluations"]), int(told["refreshes"])


def _write_part(folder: Path, series: Series, batch: int, pictures: bool) -> None:
    """Draws one batch: its pictures first, so that a part stands for them as well."""
    drawn: Drawn = series.draw(batch)
    if pictures and series.pipe.makes_pictures:
        held = series.images_of(batch)
        _write_pictures(folder, drawn.images, held, series.told(), series.labels, series.prompts)
    path = _part(folder, batch)
    draft = path.with_suffix(".tmp")
    costs = {"evaluations": str(drawn.evaluations), "refreshes": str(drawn.refreshes)}
    save_file({"images": np.ascontiguousarray(drawn.images)}, draft, metadata=costs)
    draft.replace(path)


def _write_set(
    folder: Path,
    parts: Iterable[np.ndarray],
    count: int,
    labels: np.ndarray | None,
    report: dict[str, Any],
    columns: int | None,
) -> None:
    """``samples.npz`` part by part, ``grid.png`` of the first pictures, and last ``report.json``."""
    shown: list[np.ndarray] = []

    def passing() -> Iterator[np.ndarray]:
        for part in parts:
            shown.extend(part[: max(0, _IN_GRID - len(shown))])
            yield part

    _write_npz(folder / "samples.npz", passing(), count, labels)
    images = np.stack(shown)
    if images.dtype == np.uint8:
        make_grid(images, columns=columns, scale=max(1, 32 // images.shape[1])).save(folder / "grid.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _write_npz(path: Path, parts: Iterator[np.ndarray], count: int, labels: np.ndarray | None) -> None:
    """``arr_0`` (count, ...) from its parts, and ``arr_1``; one part is in memory at a time."""
    first = next(parts)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, {**header, "shape": (count, *first.shape[1:])})
            for part in chain((first,), parts):
                file.write(np.ascontiguousarray(part).data)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels)


def _write_pictures(
    folder: Path,
    images: np.ndarray,
    which: range,
    told: dict[str, Any],
    labels: np.ndarray | None,
    prompts: list[str] | None = None,
) -> None:
    """One file an image, that carries its seed, number, settings, label or prompt, and the origin of the weights."""
    digits = max(6, len(str(told["count"])))
    for k, image in zip(which, images):
        about = {"seed": told["seed"], "image": k, "sampling": told["sampling"]}
        about |= {} if labels is None else {"label": int(labels[k])}
        about |= {} if prompts is None else {"prompt": prompts[k]}
        info = PngInfo()
        info.add_text("untwine", json.dumps({**about, "origin": told["origin"]}))
        to_pil(image).save(folder / f"{k:0{digits}d}.png", pnginfo=info)


def _remove_earlier(folder: Path) -> None:
    """Removes the set that was written here before, and nothing in a folder without its report."""
    report = folder / "report.json"
    if not report.is_file():
        return
    for file in folder.iterdir():
        if _PICTURE.fullmatch(file.name) or file.name in ("grid.png", "samples.npz"):
            file.unlink()
    report.unlink()
