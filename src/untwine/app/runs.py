"""Runs: the log of a training run as numbers and curves, and its samples over the steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from untwine.app.limits import Refused
from untwine.app.studio import Studio

POINTS = 400
"""of a curve at most"""
MAX_SHEET_BYTES = 16 * 2**20
_SHEET = re.compile(r"step-(\d+)\.png")
_NOT_PARTS = {
    *("step", "images", "loss", "grad_norm", "lr", "images_per_second", "eta_seconds", "memory_mib", "gflops"),
    *("peak_share", "seconds"),
}
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    name: str
    folder: Path
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    sheets: dict[int, Path]
    """step -> picture of samples"""

    def curve(self, key: str, kind: str = "train") -> Curve:
        """(step, value) of a number of the log, thinned."""
        lines = getattr(self, kind)
        return _thin([(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)])

    @property
    def parts(self) -> list[str]:
        """Names of the terms that the loss is made of."""
        last = self.train[-1] if self.train else {}
        return [k for k, v in last.items() if isinstance(v, float) and k not in _NOT_PARTS and "/" not in k]

    @property
    def time_bins(self) -> Curve:
        """(centre of the time bin, loss) of the newest validation, or of training where there is none."""
        lines = [line for line in self.validation or self.train if line.get("loss_per_time_bin")]
        bins = lines[-1]["loss_per_time_bin"] if lines else []
        return [((i + 0.5) / len(bins), value) for i, value in enumerate(bins) if value is not None]

    @property
    def facts(self) -> dict[str, str]:
        """Where it stands, in words."""
        last = self.train[-1] if self.train else {}
        told = {
            "step": f"{last['step']:,}" if "step" in last else None,
            "training loss": _number(last.get("loss")),
            "validation loss": _number(self.validation[-1].get("loss")) if self.validation else None,
            "learning rate": _number(last.get("lr")),
            "images/s": _number(last.get("images_per_second")),
            "left": _duration(last.get("eta_seconds")),
        }
        for name, value in (self.evaluation[-1] if self.evaluation else {}).items():
            if isinstance(value, float) and name not in _NOT_PARTS and not name.startswith("floor"):
                told[name] = _number(value)
        return {name: value for name, value in told.items() if value is not None}

    def sheet(self, step: Any) -> tuple[int, Path] | None:
        """(step, picture) of the newest samples up to ``step``, else of the first ones; None without any."""
        if not self.sheets:
            return None
        before = [s for s in self.sheets if isinstance(step, int | float) and s <= step]
        chosen = max(before) if before else min(self.sheets)
        return chosen, self.sheets[chosen]


def read_run(studio: Studio, name: Any) -> Run:
    """The run of an id.

    Raises:
        Refused: for an id that is not listed.
    """
    folder = studio.catalog.run(name)
    lines = _lines(folder / "log.jsonl")
    sheets = {}
    for file in (folder / "samples").glob("step-*.png"):
        match = _SHEET.fullmatch(file.name)
        if match and not file.is_symlink() and file.stat().st_size <= MAX_SHEET_BYTES:
            sheets[int(match[1])] = file
    train, validation, evaluation = (
        [line for line in lines if line["kind"] == kind] for kind in ("train", "validation", "evaluation")
    )
    return Run(str(name), folder, train, validation, evaluation, dict(sorted(sheets.items())))


def read_runs(studio: Studio, *names: Any) -> list[Run]:
    """The runs of one or two ids; empty ones are left out, and none twice."""
    chosen = list(dict.fromkeys(name for name in names if name not in (None, "")))
    if not chosen:
        raise Refused("no run is chosen; choose one from the list")
    return [read_run(studio, name) for name in chosen]


def curves(runs: list[Run]) -> dict[str, Mapping[str, Curve]]:
    """The charts of one or two runs, by title: name of the curve -> its points."""
    several = len(runs) > 1

    def named(what: dict[str, str], kind: str = "train") -> dict[str, Curve]:
        return {
            (f"{run.name}: {label}" if several and len(what) > 1 else run.name if several else label): found
            for run in runs
            for key, label in what.items()
            if (found := run.curve(key, kind))
        }

    loss = {f"{run.name}: training" if several else "training": run.curve("loss") for run in runs}
    loss |= {f"{run.name}: validation" if several else "validation": run.curve("loss", "validation") for run in runs}
    parts = list(dict.fromkeys(part for run in runs for part in run.parts))
    return {
        "Loss": {name: curve for name, curve in loss.items() if curve},
        "Parts of the loss": named({part: part for part in parts}) if len(parts) > 1 else {},
        "Loss by time": {run.name if several else "loss": run.time_bins for run in runs if run.time_bins},
        "Learning rate": named({"lr": "learning rate"}),
        "Images per second": named({"images_per_second": "images/s"}),
        "Norm of the gradient": named({"grad_norm": "norm"}),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, *version: int) -> list[dict[str, Any]]:
    from untwine.training.metering import read_log

    return [line for line in read_log(path) if isinstance(line.get("step"), int)]


def _thin(points: Curve) -> Curve:
    """At most ``POINTS`` of them, the last one among them."""
    every = -(-len(points) // POINTS) or 1
    return points[::-1][::every][::-1]


def _number(value: Any) -> str | None:
    return f"{value:.4g}" if isinstance(value, int | float) else None


def _duration(seconds: Any) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
