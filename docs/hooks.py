"""Docstrings name other parts in Sphinx's way, ``:class:`~untwine.x.Y```; the site shows links to them."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return ROLE.sub(lambda match: _link(short=bool(match[1]), name=match[2]), html)


def _link(*, short: bool, name: str) -> str:
    shown = f"<code>{name.rpartition('.')[2] if short else name}</code>"
    return f'<autoref identifier="{name}" optional>{shown}</autoref>' if name.startswith("untwine.") else shown
