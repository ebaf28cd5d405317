"""What can be chosen on the page: ids of checkpoints and runs. A request never names a path.

Everything that is listed is found from static files, so that the page is up before torch is. An id is looked up among
those that exist, never joined to a path, and a folder is opened only while all of it lies inside its root.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import untwine
from untwine.app.limits import Refused, one_of

ASSETS = Path(untwine.__file__).resolve().parent / "assets"
DEPTH, MOST = 3, 300
"""folders below a root that are searched, and entries that are listed at most"""
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Entry:
    """A checkpoint that can be chosen, with what its files say of it."""

    id: str
    folder: Path
    root: Path
    kind: Literal["shipped", "saved", "run"]
    classes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    takes_text: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    """the recipe it comes from"""
    version: str = ""
    """changes when the weights do"""

    @property
    def label(self) -> str:
        """How it reads in a list."""
        return self.id if self.kind == "shipped" else f"{self.id.partition(':')[2]} ({self.kind})"


class Catalog:
    """The checkpoints and runs under the configured roots.

    Args:
        root: folder of saved pipelines, None for none.
        runs: folder of runs; it need not exist yet.
        results: folder of benchmark results; likewise.
    """

    def __init__(self, root: Path | None, runs: Path, results: Path) -> None:
        if root is not None and not root.is_dir():
            raise ValueError(f"root must be a folder that exists, got {root}; create it, or leave it out")
        self.root = None if root is None else root.resolve()
        self.runs_root, self.results_root = runs.resolve(), results.resolve()

    def checkpoints(self) -> dict[str, Entry]:
        """Everything that images can be drawn from, by id; the shipped ones first."""
        found = {e.id: e for e in map(_shipped, sorted(ASSETS.glob("*/model_index.json"))) if e is not None}
        for folder in _folders(self.root):
            if (folder / "model_index.json").is_file():
                found |= _named(_saved(folder, self.root))
        for folder in _folders(self.runs_root):
            if (folder / "checkpoints").is_dir():
                found |= _named(_run(folder, self.runs_root))
        return found

    def runs(self) -> dict[str, Path]:
        """Folders of runs with a log, by id, the newest first."""
        logs = [f for f in _folders(self.runs_root) if (f / "log.jsonl").is_file()]
        logs.sort(key=lambda folder: -(folder / "log.jsonl").stat().st_mtime)
        return {folder.relative_to(self.runs_root).as_posix(): folder for folder in logs}

    def results(self) -> dict[str, Path]:
        """Files of benchmark results by name."""
        return {f.stem: f for f in sorted(self.results_root.glob("*.json"))[:MOST] if _inside(f, self.results_root)}

    def checkpoint(self, name: Any) -> Entry:
        """The checkpoint of an id.

        Raises:
            Refused: for an id that is not listed, or a folder with a link that leads out of its root.
        """
        known = self.checkpoints()
        entry = known[one_of("checkpoint", name, known)]
        _check_contained(entry.folder, entry.root)
        return entry

    def run(self, name: Any) -> Path:
        """The folder of a run by its id; raises Refused as :meth:`checkpoint`."""
        known = self.runs()
        folder = known[one_of("run", name, known)]
        for part in (folder / "log.jsonl", folder / "samples"):
            if part.exists() and not _inside(part, self.runs_root):
                raise Refused("this run has a link that leads out of the folder of runs; copy the files instead")
        return folder

    def result(self, name: Any) -> Path:
        """The file of benchmark results by its name; raises Refused for another."""
        known = self.results()
        return known[one_of("result", name, known)]


def _named(entry: Entry | None) -> dict[str, Entry]:
    return {} if entry is None else {entry.id: entry}


def _folders(root: Path | None, depth: int = DEPTH) -> Iterator[Path]:
    """The folders below ``root``, itself excepted, that lie inside it after all links are resolved."""
    left, budget = [(root, depth)] if root is not None and root.is_dir() else [], 10 * MOST
    while left and budget:
        folder, deep = left.pop(0)
        try:
            children = sorted(Path(e.path) for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        except OSError:
            continue
        for child in children[:budget]:
            budget -= 1
            if root is not None and _inside(child, root):
                yield child
                if deep > 1:
                    left.append((child, deep - 1))


def _inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # dangling, or in a circle
        return False


def _check_contained(folder: Path, root: Path) -> None:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if not _inside(Path(parent, name), root):
                raise Refused("this checkpoint has a link that leads out of its folder; copy the files instead")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_bytes()[: 2**24])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(str, values)) if isinstance(values, list) else ()


def _shipped(index: Path) -> Entry | None:
    return _pipeline(index.parent, ASSETS, "shipped", index.parent.name)


def _saved(folder: Path, root: Path | None) -> Entry | None:
    assert root is not None
    return _pipeline(folder, root, "saved", f"saved:{folder.relative_to(root).as_posix()}")


def _pipeline(folder: Path, root: Path, kind: Literal["shipped", "saved"], name: str) -> Entry | None:
    """Of a folder that ``save_pretrained`` wrote; None where its index names none of our pipelines."""
    index = _read(folder / "model_index.json") if _inside(folder / "model_index.json", root) else {}
    origin = index.get("origin")
    origin = origin if isinstance(origin, dict) else {}
    if index.get("_class_name") not in ("ImagePipeline", "TextToImagePipeline"):
        return None
    return Entry(
        name,
        folder,
        root,
        kind,
        classes=_texts(index.get("class_names")),
        prompts=_texts(origin.get("prompts")),
        takes_text=index["_class_name"] == "TextToImagePipeline",
        sampling=index.get("sampling") or {},
        recipe=origin.get("recipe"),
        version=str((folder / "model_index.json").stat().st_mtime_ns),
    )


def _run(folder: Path, root: Path) -> Entry | None:
    """Of a run's newest checkpoint; None where it has none, or one that draws nothing."""
    steps = [(int(m[1]), f) for f in (folder / "checkpoints").iterdir() if (m := _STEP.fullmatch(f.name))]
    if not steps or not _inside(newest := max(steps)[1], root):
        return None
    config, state = _read(newest / "config.json"), _read(newest / "state.json")
    if not state or not isinstance(config.get("sampling"), dict) or config.get("model", {}).get("kind") == "rae":
        return None
    return Entry(
        f"run:{folder.relative_to(root).as_posix()}",
        folder,
        root,
        "run",
        classes=_texts(state.get("class_names")),
        prompts=_texts(state.get("prompts")),
        takes_text=config.get("condition") is not None,
        sampling=config["sampling"],
        recipe=config.get("name"),
        version=newest.name,
    )
