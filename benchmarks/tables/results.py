"""Results on record, and the line that says where one comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def result_of(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(result: dict[str, Any], command: str) -> str:
    """Command, commit and machine of a result; with the commits of runs that were recorded before."""
    m, runs = result["hardware"], result.get("runs")
    found = {run.get("commit") for of in runs.values() for run in of} if isinstance(runs, dict) else set()
    earlier = sorted(found - {None, result["commit"]})
    told = f" (runs: {', '.join(f'`{commit}`' for commit in earlier)})" if earlier else ""
    return f"`{command}`, commit `{result['commit']}`{told}, {m['cpu']}, {m['threads']} threads, torch {m['torch']}"
