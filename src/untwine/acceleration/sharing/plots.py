"""Pictures of a probe and of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from untwine.plotting import figure


def draw_similarity(similarity: Tensor, refresh: Sequence[int], path: Path) -> None:
    """A heat map (N, N) of how alike the encoder states of the steps are, with the segments that share one."""
    sheet, axes = figure(1, size=(5.6, 4.8))
    num_steps = len(similarity)
    ends = (-0.5, num_steps - 0.5)
    image = axes[0].imshow(similarity.numpy(), cmap="viridis", vmax=1.0, origin="lower", extent=(*ends, *ends))
    for start, stop in zip(refresh, [*refresh[1:], num_steps]):
        low, high = start - 0.5, stop - 0.5
        axes[0].plot([low, high, high, low, low], [low, low, high, high, low], color="white", linewidth=1.2)
    axes[0].set(xlabel="solver step (0 = noise)", ylabel="solver step")
    axes[0].set_title(f"Encoder states of {num_steps} steps; boxes: the {len(refresh)} that share one", fontsize=10)
    sheet.colorbar(image, ax=axes[0], label="mean cosine similarity")
    sheet.savefig(path, dpi=140)


def draw_front(rows: Mapping[str, Mapping[str, Any]], chosen: str, path: Path) -> None:
    """Drift against FLOPs and against wall time: one line for each ``series`` of the rows, a ring around the plan."""
    sheet, axes = figure(2, size=(10.5, 4.6))
    exact = rows["exact"]
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows.values():
        if row["drift"] > 0:
            series.setdefault(row["series"], []).append(row)
    for panel, key, label in ((axes[0], "flops", "FLOPs"), (axes[1], "seconds", "wall time")):
        for name, points in series.items():
            points = sorted(points, key=lambda row: row["flops"])
            style = {"color": "black", "linestyle": "--"} if name == "fewer solver steps" else {}
            values = [100 * row[key] / exact[key] for row in points]
            panel.plot(values, [row["drift"] for row in points], marker="o", markersize=4, label=name, **style)
        if rows[chosen]["drift"] > 0:
            here = 100 * rows[chosen][key] / exact[key], rows[chosen]["drift"]
            panel.plot(*here, marker="o", markersize=12, fillstyle="none", color="red", linestyle="none", label="plan")
        panel.set(yscale="log", xlabel=f"{label}, % of the exact run", ylabel="mean squared distance to exact latents")
        panel.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    sheet.savefig(path, dpi=140)
