"""Fails when a source file has more than 500 lines or a function more than 60."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

MAX_FILE, MAX_FUNCTION = 500, 60


def problems(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        source = path.read_text()
        if (lines := source.count("\n")) > MAX_FILE:
            found.append(f"{path}: {lines} lines > {MAX_FILE}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    found.append(f"{path}:{node.lineno}: {node.name} has {length} lines > {MAX_FUNCTION}")
    return found


if __name__ == "__main__":
    top = Path(__file__).resolve().parent.parent
    found = [p for part in ("src", "tests", "benchmarks") for p in problems(top / part)]
    print("\n".join(found) or "sizes: ok")
    sys.exit(bool(found))
