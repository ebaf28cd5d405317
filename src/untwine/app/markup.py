"""Pieces of HTML. Everything that comes from outside is escaped here."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from untwine.app.watch import Frame


def note(text: str, *commands: str) -> str:
    """What to do where there is nothing to show: a sentence, and commands for the terminal."""
    lines = "".join(f"<pre><code>{escape(command)}</code></pre>" for command in commands)
    return f'<div class="uw-note"><p>{escape(text)}</p>{lines}</div>'


def status(text: str) -> str:
    """One line that a screen reader announces."""
    return f'<p class="uw-status" role="status">{escape(text)}</p>'


def facts(values: Mapping[str, Any]) -> str:
    """Names above their values."""
    parts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(_told(v))}</dd></div>" for k, v in values.items())
    return f'<dl class="uw-facts">{parts}</dl>'


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways on a narrow page; the first column names the row."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    inside = f"{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="uw-table" tabindex="0"><table>{inside}</table></div>'


def folded(summary: str, inside: str) -> str:
    """What is there for those who ask."""
    return f'<details class="uw-more"><summary>{escape(summary)}</summary>{inside}</details>'


def picture(image: Image, alt: str, caption: str = "", *, css: str = "") -> str:
    """A figure with its picture inside the page."""
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="uw-figure {css}"><img src="{data_uri(image)}" alt="{escape(alt)}">{told}</figure>'


def data_uri(image: Image) -> str:
    """The picture as a PNG inside a URI."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def film(frames: Sequence[Frame], final: Image) -> str:
    """A strip of two rows: x_t, and the x0 that the network predicts there."""
    from PIL.Image import Image as Picture

    def thumbnail(image: Picture) -> Picture:
        image = image.copy()
        image.thumbnail((128, 128))
        return image

    def cell(image: Picture, alt: str) -> str:
        return f'<img src="{data_uri(thumbnail(image))}" alt="{escape(alt)}">'

    parts = [
        f"<li>{cell(f.x_t, f'x_t at step {f.step}')}{cell(f.x0, f'predicted x0 at step {f.step}')}"
        f"<span>step {f.step}<br>t = {f.t:.2f}</span></li>"
        for f in frames
    ]
    parts.append(
        f"<li>{cell(final, 'the final image')}{cell(final, 'the final image')}<span>final<br>t = 0</span></li>"
    )
    head = '<li class="uw-rows" aria-hidden="true"><b>x<sub>t</sub></b><b>x<sub>0</sub></b><span></span></li>'
    return f'<ol class="uw-film" tabindex="0" aria-label="Film strip of the denoising">{head}{"".join(parts)}</ol>'


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
