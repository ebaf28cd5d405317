"""Curves and heat maps as SVG: sharp at any width, and in the colours of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from untwine.app.markup import data_uri

if TYPE_CHECKING:
    from numpy import ndarray

WIDTH, HEIGHT = 420, 232
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 10, 40
_VIRIDIS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))
Curve = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    marked: Sequence[tuple[float, float]] = (),
    mark: str = "",
    falling: bool = False,
) -> str:
    """A figure of up to six curves with a legend.

    Args:
        log: a logarithmic y axis, where all values are positive.
        marked: intervals of x that are shaded; ``mark`` says in the legend what they are.
        falling: x runs from right to left, as time does in sampling.
    """
    points = [(x, y) for curve in curves.values() for x, y in curve if math.isfinite(y)]
    if not points:
        return ""
    log = log and min(y for _, y in points) > 0
    xs = _Axis([x for x, _ in points], (WIDTH - RIGHT, LEFT) if falling else (LEFT, WIDTH - RIGHT))
    ys = _Axis([y for _, y in points], (HEIGHT - BOTTOM, TOP), log=log, padded=True)
    shades = "".join(
        f'<rect class="uw-marked" x="{min(xs(a), xs(b)):.1f}" y="{TOP}" width="{abs(xs(b) - xs(a)):.1f}" '
        f'height="{HEIGHT - BOTTOM - TOP}"/>'
        for a, b in marked
    )
    drawn = "".join(_curve(k, curve, xs, ys) for k, curve in enumerate(curves.values()))
    svg = f"{shades}{_frame(xs, ys, x_label, y_label)}{drawn}"
    names = list(curves) if len(curves) > 1 or marked else []
    legend = "".join(f'<span class="uw-key uw-c{k % 6}">{escape(name)}</span>' for k, name in enumerate(names))
    legend += f'<span class="uw-key uw-marked-key">{escape(mark)}</span>' if marked and mark else ""
    last = "; ".join(f"{name} ends at {curve[-1][1]:.4g}" for name, curve in curves.items() if curve)
    return _figure(title, svg, legend, f"{title}: {y_label} against {x_label}. {last}", WIDTH, HEIGHT)


def heat_map(title: str, matrix: ndarray, boxes: Sequence[int], label: str) -> str:
    """A square matrix with the segments that start at each of ``boxes`` as frames, step 0 at the lower left."""
    from PIL import Image

    size, side, low = len(matrix), 320, float(matrix.min())
    left, bottom, bar = 44, 40, 62
    shades = np.interp(matrix, (low, 1.0), (0, len(_VIRIDIS) - 1)) if low < 1 else np.zeros_like(matrix)
    rgb = np.stack([np.interp(shades, range(len(_VIRIDIS)), channel) for channel in zip(*_VIRIDIS)], -1)
    uri = data_uri(Image.fromarray(rgb[::-1].round().astype(np.uint8)))
    ramp = np.stack([np.interp(np.linspace(5, 0, 64), range(6), channel) for channel in zip(*_VIRIDIS)], -1)
    ramp_uri = data_uri(Image.fromarray(ramp[:, None].round().astype(np.uint8)))
    unit = side / size
    frames = "".join(
        f'<rect class="uw-box" x="{left + a * unit:.2f}" y="{TOP + side - b * unit:.2f}" '
        f'width="{(b - a) * unit:.2f}" height="{(b - a) * unit:.2f}"/>'
        for a, b in zip(boxes, [*boxes[1:], size])
    )
    ticks = "".join(
        f'<text x="{left + (k + 0.5) * unit:.1f}" y="{TOP + side + 15}" text-anchor="middle">{k}</text>'
        f'<text x="{left - 6}" y="{TOP + side - (k + 0.5) * unit + 4:.1f}" text-anchor="end">{k}</text>'
        for k in _whole_ticks(size)
    )
    at = left + side + 14
    svg = (
        f'<image href="{uri}" x="{left}" y="{TOP}" width="{side}" height="{side}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated"/>{frames}{ticks}'
        f'<text x="{left + side / 2}" y="{TOP + side + 33}" text-anchor="middle">solver step (0 = noise)</text>'
        f'<text transform="translate(12 {TOP + side / 2}) rotate(-90)" text-anchor="middle">solver step</text>'
        f'<image href="{ramp_uri}" x="{at}" y="{TOP}" width="12" height="{side}" preserveAspectRatio="none"/>'
        f'<text x="{at + 16}" y="{TOP + 10}">1</text><text x="{at + 16}" y="{TOP + side}">{low:.2f}</text>'
    )
    told = f"{title}: {label} from {low:.3f} to 1; the encoder runs at steps {', '.join(map(str, boxes))}"
    key = f'<span class="uw-key uw-ramp-key">{escape(label)}</span>'
    return _figure(title, svg, key, told, left + side + bar, TOP + side + bottom)


def _figure(title: str, svg: str, legend: str, told: str, width: float, height: float) -> str:
    return (
        f'<figure class="uw-chart"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}">{svg}</svg></figure>'
    )


class _Axis:
    """Values to positions, and where to put ticks."""

    def __init__(
        self, values: Sequence[float], ends: tuple[float, float], *, log: bool = False, padded: bool = False
    ) -> None:
        self.log, self.ends, self.whole = log, ends, all(v == int(v) for v in values)
        low, high = (math.log10(v) if log else v for v in (min(values), max(values)))
        if low == high:
            low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
        margin = 0.05 * (high - low) if padded else 0
        self.low, self.high = low - margin, high + margin

    def __call__(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.ends[0] + share * (self.ends[1] - self.ends[0])

    def ticks(self) -> list[float]:
        """Three to seven round values."""
        if self.log and self.high - self.low > 0.9:
            low, high = 10**self.low, 10**self.high
            every = [m * 10.0**e for e in range(math.floor(self.low), math.ceil(self.high) + 1) for m in (1, 2, 5)]
            found = [v for v in every if low <= v <= high]
            return found if len(found) <= 7 else [v for v in found if _is_decade(v)]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        rough = (high - low) / 4
        steps = [m * 10 ** math.floor(math.log10(rough)) for m in (1, 2, 2.5, 5, 10)]
        step = min((s for s in steps if not self.whole or s == int(s)), key=lambda s: abs(s - rough), default=1)
        first = math.ceil(low / step - 1e-9)
        return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _is_decade(value: float) -> bool:
    return abs(math.log10(value) - round(math.log10(value))) < 1e-9


def _whole_ticks(size: int) -> list[int]:
    step = next(s for s in (1, 2, 5, 10, 20, 25, 50, 100, 1000) if size / s <= 7 or s == 1000)
    return list(range(0, size, step))


def _frame(xs: _Axis, ys: _Axis, x_label: str, y_label: str) -> str:
    base = HEIGHT - BOTTOM
    parts = [
        f'<line class="uw-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ys(v):.1f}" y2="{ys(v):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{ys(v) + 4:.1f}" text-anchor="end">{_tick(v)}</text>'
        for v in ys.ticks()
    ]
    parts += [f'<text x="{xs(v):.1f}" y="{base + 16}" text-anchor="middle">{_tick(v)}</text>' for v in xs.ticks()]
    parts.append(f'<line class="uw-axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + base) / 2
    parts.append(f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _curve(k: int, curve: Curve, xs: _Axis, ys: _Axis) -> str:
    found = [(xs(x), ys(y)) for x, y in curve if math.isfinite(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in found)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in found) if len(found) <= 24 else ""
    return f'<g class="uw-c{k % 6}"><polyline points="{path}"/>{dots}</g>'


def _tick(value: float) -> str:
    if value and not 1e-2 <= abs(value) < 1e5:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
