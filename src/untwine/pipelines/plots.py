"""Pictures of sweeps and of training logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from untwine.plotting import figure

_LABELS = {
    "num_inference_steps": "solver steps",
    "guidance_scale": "guidance scale",
    "refresh_every": "steps that share one encoder state",
    "fd": "Frechet distance",
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
}


def draw_sweeps(sweeps: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The distance of each sweep against its setting and against seconds an image; the floor is what real data have."""
    first = next(iter(sweeps.values()))
    metric = next(name for name in ("fid", "fd", "kid") if name in first["rows"][0])
    sheet, axes = figure(2, size=(10.0, 4.2))
    for name, found in sweeps.items():
        heights = [row[metric] for row in found["rows"]]
        for panel, key in ((axes[0], "value"), (axes[1], "seconds_per_image")):
            panel.plot([row[key] for row in found["rows"]], heights, marker="o", markersize=4, label=name)
        for row in found["rows"]:
            told = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 8}
            axes[1].annotate(f"{row['value']}", (row["seconds_per_image"], row[metric]), **told)
    level = (first.get("floor") or {}).get(metric)
    for panel in axes:
        if isinstance(level, float) and level > 0:
            panel.axhline(level, color="grey", linestyle="--", linewidth=1, label="floor: real against real")
        panel.set(ylabel=f"{_label(metric)} ({first['encoder']['name']}, {first['protocol']['num_samples']} samples)")
        panel.grid(alpha=0.3)
    axes[0].set(xlabel=_label(first["setting"]))
    axes[1].set(xlabel=f"seconds an image (numbers: {_label(first['setting'])})")
    axes[0].legend(fontsize=9)
    sheet.savefig(path, dpi=140)


def draw_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Validation loss against steps, and the last loss by time bin, of lines of ``log.jsonl``."""
    sheet, axes = figure(2, size=(10.0, 4.2))
    for name, lines in runs.items():
        axes[0].plot(
            [line["step"] for line in lines], [line["loss"] for line in lines], marker="o", markersize=3, label=name
        )
        bins = lines[-1]["loss_per_time_bin"]
        centres = [(i + 0.5) / len(bins) for i in range(len(bins))]
        axes[1].plot(centres, bins, marker="o", markersize=3, label=f"{name}, step {lines[-1]['step']}")
    axes[0].set(xlabel="optimizer step", ylabel="validation loss", yscale="log")
    axes[1].set(xlabel="t (0 = data, 1 = noise)", ylabel="validation loss in the time bin")
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=9)
    sheet.savefig(path, dpi=140)


def _label(name: str) -> str:
    return _LABELS.get(name, name)
