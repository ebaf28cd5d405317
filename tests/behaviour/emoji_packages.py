"""A stand-in for ``npm`` on the path: it "installs" two small emoji packages, so that tests touch no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.behaviour.pictures import save

RECORDS: list[dict[str, Any]] = [
    {"image": "a.png", "name": "CAT FACE", "category": "Animals & Nature", "subcategory": "animal-mammal"},
    {"image": "b.png", "name": "Dog", "category": "Animals & Nature", "subcategory": "animal-mammal"},
    {"image": "c.png", "name": "Egypt Flag", "category": "Flags", "subcategory": "country-flag"},
    {
        "image": "d.png",
        "name": "WAVE",
        "category": "People & Body",
        "subcategory": "hand",
        "skin_variations": {"1F3FB": {"image": "d-1.png"}, "1F3FC": {"image": "d-2.png"}},
    },
    {"image": "e.png", "name": "Swatch", "category": "Component", "subcategory": "skin-tone"},
]


def make_package(modules: Path, style: str, absent: tuple[str, ...] = ()) -> None:
    """``node_modules/emoji-datasource-STYLE`` as npm leaves it; ``absent`` pictures are not drawn in this style."""
    package = modules / f"emoji-datasource-{style}"
    for record in RECORDS:
        for image in (record["image"], *(v["image"] for v in record.get("skin_variations", {}).values())):
            if image not in absent:
                rng = np.random.default_rng(len(style) * 100 + sum(image.encode()))
                rgba = rng.integers(0, 256, (64, 64, 4), np.uint8)
                rgba[:8, :, 3] = 0
                save(package / "img" / style / "64" / image, rgba)
    (package / "emoji.json").write_text(json.dumps(RECORDS))
    (package / "package.json").write_text(json.dumps({"version": "16.0.0"}))


def fake_npm(folder: Path, failure: str | None = None) -> None:
    """An executable ``npm`` in ``folder`` that makes the packages it is asked for, or fails."""
    folder.mkdir(exist_ok=True)
    root = Path(__file__).resolve().parent.parent.parent
    script = f"""#!{sys.executable}
import sys
from pathlib import Path
sys.path.insert(0, {str(root)!r})
from tests.behaviour.emoji_packages import make_package
if {failure!r}:
    print({failure!r}, file=sys.stderr)
    sys.exit(7)
assert sys.argv[1] == "install" and "--ignore-scripts" in sys.argv, sys.argv
prefix = Path(sys.argv[sys.argv.index("--prefix") + 1])
for name in sys.argv:
    if name.startswith("emoji-datasource-"):
        style = name.rpartition("-")[2]
        make_package(prefix / "node_modules", style, ("c.png",) if style == "twitter" else ())
"""
    (folder / "npm").write_text(script)
    (folder / "npm").chmod(0o755)
