"""Emoji in two styles: 1906 named pictures of 64 x 64, each drawn by Google (Noto) and by Twitter (Twemoji).

``untwine data emoji`` prepares a folder once, from the npm packages ``emoji-datasource-google`` and
``emoji-datasource-twitter``: ``STYLE/IMAGE.png``, and ``emoji.json`` with names, categories, licences and attribution.
Whoever publishes pictures of the Twitter style, or a model trained on them, must give that attribution (CC-BY 4.0).
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from untwine.data.base import Dataset
from untwine.data.folder import fingerprint_of
from untwine.data.images import Preparation, decode
from untwine.diffusion.draws import Draws

logger = logging.getLogger(__name__)
Style = Literal["google", "twitter"]
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
LICENCES = {
    "google": {
        "licence": "Apache-2.0",
        "attribution": "Noto Emoji, copyright Google LLC, https://github.com/googlefonts/noto-emoji",
    },
    "twitter": {
        "licence": "CC-BY-4.0",
        "attribution": "Twemoji, copyright Twitter, Inc and other contributors, https://github.com/jdecked/twemoji",
    },
}
METADATA, _FORMAT = "emoji.json", "untwine-emoji-1"


class Emoji(Dataset):
    """Emoji on a white ground. A class is a style and a category, such as ``google/Flags``; the caption is the name,
    such as ``smiling cat face with open mouth``.

    The drawings of one emoji, in either style and in all skin tones, are held out together.

    Args:
        root: the folder that ``untwine data emoji --out FOLDER`` made.
        styles: one or both; the classes of the first come first.
        resolution: side in pixels; the pictures have 64.
        captions: "name"; or "style": the name alone or with its style (``cat face, google style``), drawn anew each
            time, so that a model of texts can be told the style and need not be.
    """

    def __init__(
        self,
        root: Path = Path("data/emoji"),
        styles: tuple[Style, ...] = ("google", "twitter"),
        resolution: int = 64,
        captions: Literal["name", "style"] = "name",
    ) -> None:
        self.root, self.prepare = Path(root), Preparation(resolution)
        if not styles or len(set(styles)) < len(styles) or not set(styles) <= set(LICENCES):
            raise ValueError(f"styles must be one or both of {', '.join(LICENCES)}, got {styles}")
        metadata = _read_metadata(self.root)
        if missing := [style for style in styles if style not in metadata["styles"]]:
            raise ValueError(f"styles: {self.root} lacks {', '.join(missing)}; it has {', '.join(metadata['styles'])}")
        drawn = [(s, e) for s, style in enumerate(styles) for e in metadata["emoji"] if style in e["styles"]]
        groups = {image: i for i, image in enumerate(dict.fromkeys(e["base"] for e in metadata["emoji"]))}
        self.class_names = tuple(f"{style}/{category}" for style in styles for category in CATEGORIES)
        self.num_classes = len(self.class_names)
        classes = [s * len(CATEGORIES) + CATEGORIES.index(e["category"]) for s, e in drawn]
        self.labels = np.array(classes, np.int64)
        self.groups = np.array([groups[e["base"]] for _, e in drawn], np.int64)
        self.captions = [e["name"] for _, e in drawn]
        if captions == "style":
            self.captions = [f"{e['name']}\n{e['name']}, {styles[s]} style" for s, e in drawn]
        self.names = [f"{styles[s]}/{e['image']}" for s, e in drawn]
        self.sample_shape = (3, resolution, resolution)

    def __len__(self) -> int:
        return len(self.names or ())

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        return self.prepare(decode(self.root / self.names[position]), draws, index)  # type: ignore[index]

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_of(self.root, list(self.names or ()))


def prepare(out: str | Path, styles: Sequence[str] = tuple(LICENCES), *, skin_tones: bool = False) -> dict[str, int]:
    """Makes the folder that :class:`Emoji` reads; how many pictures of each style there are.

    A folder appears whole or not at all, and one that is complete is left as it is.

    Args:
        out: the folder; it must not exist, or hold nothing else.
        styles: ``google``, ``twitter`` or both.
        skin_tones: with the variants in five skin tones (half as many pictures again).

    Raises:
        ValueError: for an unknown style, an ``out`` that holds other things, or one prepared with other options.
        RuntimeError: without ``npm``, or where it fails; the message tells what it said.
    """
    out = Path(out)
    if unknown := sorted(set(styles) - set(LICENCES)) or not styles:
        raise ValueError(f"styles must be one or both of {', '.join(LICENCES)}, got {unknown or 'none'}")
    if out.is_dir() and any(out.iterdir()):
        return _prepared_before(out, styles, skin_tones)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".emoji-", dir=out.parent) as folder:
        packages, staged = Path(folder) / "packages", Path(folder) / "emoji"
        _install(packages, styles)
        counts = _collect(packages, staged, styles, skin_tones)
        if out.is_dir():
            out.rmdir()
        staged.rename(out)
    return counts


def _prepared_before(out: Path, styles: Sequence[str], skin_tones: bool) -> dict[str, int]:
    metadata = _read_metadata(out)
    if set(metadata["styles"]) != set(styles) or metadata["skin_tones"] != skin_tones:
        raise ValueError(
            f"{out} was prepared with styles {', '.join(metadata['styles'])} and skin_tones={metadata['skin_tones']}; "
            "remove it, or choose another folder"
        )
    return _counts(metadata)


def _counts(metadata: dict[str, Any]) -> dict[str, int]:
    return {style: sum(style in e["styles"] for e in metadata["emoji"]) for style in metadata["styles"]}


def _install(folder: Path, styles: Sequence[str]) -> None:
    npm = shutil.which("npm")
    names = [f"emoji-datasource-{style}" for style in styles]
    if npm is None:
        raise RuntimeError(
            f"the emoji come in the npm packages {' and '.join(names)}, and npm is not installed: install it (Debian: "
            "apt install npm), or copy a folder prepared on another machine"
        )
    folder.mkdir()
    (folder / "package.json").write_text("{}")  # else npm would install into a project above
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *names]
    logger.info("npm downloads %s, about 80 MB each", " and ".join(names))
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-1000:]
        raise RuntimeError(f"npm could not install {' and '.join(names)} (exit status {done.returncode}):\n{said}")


def _collect(packages: Path, out: Path, styles: Sequence[str], skin_tones: bool) -> dict[str, int]:
    """Copies pictures and writes the metadata, from installed packages into a new folder."""
    out.mkdir()
    emoji: dict[str, dict[str, Any]] = {}
    told: dict[str, Any] = {}
    for style in styles:
        package = packages / "node_modules" / f"emoji-datasource-{style}"
        version = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
        told[style] = {**LICENCES[style], "source": f"npm emoji-datasource-{style} {version}"}
        (out / style).mkdir()
        for entry in _entries(json.loads((package / "emoji.json").read_text(encoding="utf-8")), skin_tones):
            picture = package / "img" / style / "64" / entry["image"]
            if picture.is_file():
                shutil.copyfile(picture, out / style / entry["image"])
                emoji.setdefault(entry["image"], {**entry, "styles": []})["styles"].append(style)
    ordered = [emoji[image] for image in sorted(emoji)]
    metadata = {"format": _FORMAT, "skin_tones": skin_tones, "styles": told, "emoji": ordered}
    (out / METADATA).write_text(json.dumps(metadata, indent=1, ensure_ascii=False), encoding="utf-8")
    return _counts(metadata)


def _entries(records: list[dict[str, Any]], skin_tones: bool) -> list[dict[str, Any]]:
    """The pictures of the records that belong to a category in use."""
    found = []
    for record in records:
        if record["category"] not in CATEGORIES:
            continue
        variants = record.get("skin_variations", {}).values() if skin_tones else ()
        for image in (record["image"], *(variant["image"] for variant in variants)):
            about = {"category": record["category"], "subcategory": record["subcategory"], "base": record["image"]}
            found.append({"image": image, "name": record["name"].lower(), **about})
    return found


def _read_metadata(root: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((root / METADATA).read_text(encoding="utf-8"))
        if metadata["format"] != _FORMAT:
            raise ValueError(f"format {metadata['format']!r}, expected {_FORMAT!r}")
    except FileNotFoundError as error:
        raise ValueError(
            f"{root} holds no emoji ({METADATA} is missing); prepare it: untwine data emoji --out {root}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / METADATA} is damaged: {error}; remove {root} and prepare it again") from error
    return metadata
