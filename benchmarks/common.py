"""What the benchmarks share: interleaved timing, and results that name commit and hardware."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def paired(runs: dict[str, Callable[[], Any]], *, repeats: int = 7, warmup: int = 1) -> dict[str, dict[str, float]]:
    """Seconds of each run, taken in turn (A B A B ...): median, minimum and maximum."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s), "repeats": len(s)}
        for name, s in seconds.items()
    }


def hardware() -> dict[str, Any]:
    """The machine and software that a number belongs to."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str:
    """The commit of the checkout, marked where code (not results or text) has changed since."""
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "src", "tests", "benchmarks", ":!benchmarks/results"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changes else head


COMMIT = _commit()  # of what was imported, whatever happens to the checkout while it runs


def save(name: str, values: dict[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json`` and prints it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"benchmark": name, "commit": COMMIT, "hardware": hardware(), **values}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    return path


def kept(file: Path, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a long run and its commit: from ``file`` if it is there, or of ``run``, and then kept there.

    So the runs of an experiment can be spread over days and machines. A file of other settings is refused.
    """
    settings = json.loads(json.dumps(settings))
    if not file.is_file():
        record = {"hardware": hardware(), "settings": settings, "result": {"commit": COMMIT, **run()}}
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.replace(file)
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["settings"] != settings:
        raise SystemExit(f"{file} is of a run of other settings: remove it, or give another folder")
    return record["result"]


def without_root(recipe: Any) -> dict[str, Any]:
    """A recipe as plain data, but for the place where its data lie."""
    told = recipe.to_dict()
    return told | {"data": {key: value for key, value in told["data"].items() if key != "root"}}


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
