"""Measure: samples of a checkpoint against real pictures, by a protocol; and the tables of benchmark results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import untwine
from untwine.app.jobs import Job
from untwine.app.limits import Refused, one_of, whole
from untwine.app.requests import Request
from untwine.app.studio import Studio

RECIPES = Path(untwine.__file__).resolve().parent / "recipes"
BATCH = 32
HOW = "How it was measured"
_ABOUT = ("benchmark", "commit", "hardware", "settings", "command")
DEFAULT_PROTOCOL = "kid-efflite0-500"
_NEED_FILES = ("inception", "dinov2", "siglip", "clip")
"""encoders whose weights the user would have to name"""


@dataclass(frozen=True)
class Evaluated:
    """The report of an evaluation."""

    values: dict[str, Any]
    file: Path
    nearest: Path | None
    """the samples that resemble real pictures most, above those pictures"""

    @property
    def rows(self) -> list[dict[str, str]]:
        """The metrics, each with what real pictures reach against real pictures."""
        floor = self.values["floor"] or {}
        rows = []
        for name, value in self.values["metrics"].items():
            if name.endswith(("_std", "_whole")):
                continue
            spread = self.values["metrics"].get(f"{name}_std")
            level = floor.get(name)
            rows.append(
                {
                    "metric": _TITLES.get(name, name),
                    "value": f"{value:.4g}" + (f" ± {spread:.2g}" if spread is not None else ""),
                    "real against real": f"{level:.4g}" if isinstance(level, float) else "–",
                }
            )
        return rows


_TITLES = {
    "fid": "FID (lower is better)",
    "fd": "Fréchet distance (lower is better)",
    "kid": "KID (lower is better)",
    "precision": "precision (higher: sharper)",
    "recall": "recall (higher: more varied)",
    "density": "density (higher is better)",
    "coverage": "coverage (higher is better)",
}


def references() -> list[str]:
    """The shipped recipes whose data can be compared with."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml") if "kind: folder" not in file.read_text("utf-8"))


def protocols() -> list[str]:
    """The protocols that need no further files."""
    from untwine.evaluation.protocols import PROTOCOLS

    return [name for name, protocol in PROTOCOLS.items() if protocol.encoder not in _NEED_FILES]


def evaluate(studio: Studio, request: Request, reference: Any, protocol: Any, num_samples: Any, job: Job) -> Evaluated:
    """Draws ``num_samples`` images of the classes in turn and compares them with the data of the recipe ``reference``.

    Raises:
        Refused: for a reference or protocol that is not listed, or too many samples.
    """
    from untwine.evaluation.protocols import find_protocol
    from untwine.evaluation.references import Reference, from_dataset
    from untwine.evaluation.report import evaluate as judge
    from untwine.training.recipe import Recipe

    reference, known = one_of("reference", reference, references()), protocols()
    count = whole("samples", num_samples, 2, studio.limits.max_samples)
    chosen = find_protocol(one_of("protocol", protocol, known), num_samples=count)
    job.begin("opening the data")
    dataset = Recipe.load(reference).data.build()
    real = Reference(reference, lambda size: from_dataset(dataset, reference))
    pipe = studio.pipe(request.entry)
    if not pipe.makes_pictures:
        raise Refused("this checkpoint makes latents and has no codec for pictures; choose one that has")
    real.pictures(pipe.sample_shape[1:])  # type: ignore[arg-type]  # of another size? then nothing is drawn
    images = _draw(studio, request, count, job)
    folder = studio.outputs.new()
    job.begin("comparing with real pictures")
    report = judge(
        images,
        real,
        chosen,
        out=folder,
        batch_size=BATCH,
        cache=studio.outputs.folder / "references",
        facts={"checkpoint": request.entry.id, "seed": request.seed, "origin": pipe.origin},
        on_batch=lambda done: job.at(done, count),
    )
    studio.outputs.trim()
    nearest = folder / "nearest.png"
    return Evaluated(report.values, folder / "evaluation.json", nearest if nearest.is_file() else None)


def _draw(studio: Studio, request: Request, count: int, job: Job) -> Any:
    """(count, H, W, C) levels, batch by batch."""
    import numpy as np

    from untwine.pipelines.series import Series

    pipe = studio.pipe(request.entry)
    series = Series(pipe, count=count, seed=request.seed, batch_size=BATCH, sampling=request.settings(pipe))
    parts = []
    for batch in range(len(series)):
        first = series.images_of(batch)

        def told(at: Any, x: Any, first: range = first) -> None:
            job.at(first.start * at.num_steps + len(first) * (at.step + 1), count * at.num_steps)

        job.begin(f"drawing {first.stop} of {count}")
        parts.append(series.draw(batch, on_step=told).images)
    return np.concatenate(parts)


@dataclass(frozen=True)
class Table:
    """Part of a file of results."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def read_results(path: Path) -> list[Table]:
    """A file of results as tables: first single values, then each group of like records.

    Raises:
        Refused: for a file that holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        raise Refused("this file holds no results; write it anew with its benchmark")
    about = {name: value for name, value in data.items() if name in _ABOUT}
    rest = {name: value for name, value in data.items() if name not in _ABOUT}
    return [*_tables("", rest), _facts(HOW, _flat(about))]


def _tables(title: str, data: Mapping[str, Any]) -> list[Table]:
    """Single values first, then a table for each group of like records, and whatever else lies deeper."""
    single = {name: value for name, value in data.items() if _is_single(value)}
    found = [_facts(title, single)] if single else []
    for name, value in data.items():
        inner = f"{title}, {name}" if title else name
        if records := _records(value):
            found.append(_compared(inner, records))
        elif isinstance(value, Mapping):
            found += _tables(inner, value)
    return found


def _facts(title: str, values: Mapping[str, Any]) -> Table:
    return Table(title, ["", "value"], [[name, _cell(value)] for name, value in values.items()])


def _compared(title: str, records: dict[str, dict[str, Any]]) -> Table:
    """A row a record; a column a record where few records have many values."""
    keys = list(dict.fromkeys(key for record in records.values() for key in record))
    if len(records) < 8 and len(keys) > len(records):
        rows = [[key, *(_cell(record.get(key, "")) for record in records.values())] for key in keys]
        return Table(title, ["", *records], rows)
    rows = [[name, *(_cell(record.get(key, "")) for key in keys)] for name, record in records.items()]
    return Table(title, ["", *keys], rows)


def _records(value: Any) -> dict[str, dict[str, Any]] | None:
    """Named records, flattened, of a list or a mapping of mappings; None where it is something else."""
    named = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(named, Mapping) or not named or not all(isinstance(v, Mapping) for v in named.values()):
        return None
    return {str(name): _flat(record) for name, record in named.items()}


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The members of inner mappings beside the others, by their path."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name} {inner}": v for inner, v in _flat(value).items()}
        else:
            found[name] = value
    return found


def _is_single(value: Any) -> bool:
    return not isinstance(value, Mapping) and not _records(value)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | Mapping):
        if not value:
            return "–"
        members = [_cell(v) for v in (value if isinstance(value, list) else value.values())]
        return ", ".join(members[:8]) + (f", … ({len(members)})" if len(members) > 8 else "")
    return f"{value:,}" if isinstance(value, int) else str(value)


def without_labels(request: Request) -> Request:
    """The request for all classes in turn, as an evaluation draws them."""
    return replace(request, label=None, prompt="", count=1, first_image=0, size=None)
