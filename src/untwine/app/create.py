"""Create: images of one request, with their settings, to look at and to keep."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.app.jobs import Job
from untwine.app.requests import Request
from untwine.app.studio import Studio


@dataclass(frozen=True)
class Created:
    """What one request made."""

    request: Request
    pictures: list[tuple[Path, str]]
    """files and captions"""
    files: list[Path]
    """everything to keep: ``samples.npz``, the sheet, the report"""
    report: dict[str, Any]

    def about(self, k: int) -> dict[str, Any]:
        """Settings of one picture, as its file carries them."""
        from PIL import Image

        with Image.open(self.pictures[k][0]) as picture:
            return json.loads(picture.text["untwine"])  # type: ignore[attr-defined]


def create(studio: Studio, request: Request, job: Job) -> Created:
    """Draws the images into a new folder of the outputs.

    Raises:
        Stopped: where the job was stopped; nothing is left then.
        ValueError: for what the checkpoint cannot do.
    """
    from untwine.pipelines.series import Samples
    from untwine.pipelines.writing import save_samples

    job.begin("drawing")
    pipe = studio.pipe(request.entry)
    series = request.series(pipe)
    studio.limits.check_size(pipe.sample_shape[1:] if request.size is None else request.size, request.count)  # type: ignore[arg-type]
    started = time.perf_counter()
    drawn = series.draw(0, on_step=job.step)
    report = series.report(drawn.evaluations, drawn.refreshes, time.perf_counter() - started)
    folder = studio.outputs.new()
    save_samples(Samples(drawn.images, series.labels, report, series.prompts), folder)
    studio.outputs.trim()
    captions = [f"{_caption(request, series, k)} · #{k}" for k in range(request.count)]
    pictures = sorted(folder.glob("[0-9]*.png"))
    files = [folder / name for name in ("samples.npz", "grid.png", "report.json")]
    return Created(request, list(zip(pictures, captions)), [f for f in files if f.is_file()], report)


def _caption(request: Request, series: Any, k: int) -> str:
    if series.prompts is not None:
        return series.prompts[k]
    if series.labels is None:
        return f"seed {request.seed}"
    label = int(series.labels[k])
    return request.entry.classes[label] if label < len(request.entry.classes) else f"class {label}"
