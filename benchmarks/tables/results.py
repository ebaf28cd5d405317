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
    m = result["hardware"]
    return f"`{command}`, commit `{result['commit']}`, {m['cpu']}, {m['threads']} threads, torch {m['torch']}"
