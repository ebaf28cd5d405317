"""Figures without a display; matplotlib comes with the ``plot`` extra."""

from __future__ import annotations

from typing import Any


def figure(panels: int, *, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of ``size`` inches and its ``panels`` axes side by side.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install untwine[plot]") from error
    found = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(found)
    return found, found.subplots(1, panels, squeeze=False)[0]
