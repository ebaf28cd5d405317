"""Runs the code blocks of a page of the documentation, in order, in the current folder.

| fence     | what is done with it |
|-----------|----------------------|
| `bash`    | every command runs and must succeed |
| `python`  | runs; all Python of a page shares its names |
| `pycon`   | runs as a doctest: what it prints must be what the page shows |
| `console` | every `$ command` runs, whatever its status; its output must be what the page shows |

`...` in shown output stands for anything. Other fences are only shown. `untwine` runs in this process.
"""

from __future__ import annotations

import doctest
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from untwine.cli import main

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MADE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)(?:\{[^}]*\})? <!-- made: (\S+) -->")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def run_page(page: Path, short: Mapping[str, str] | None = None) -> int:
    """Runs the blocks of ``page`` and says how many ran.

    Args:
        short: how a ``bash`` command starts -> flags added to it, where the page's would take hours.

    Raises:
        AssertionError: naming the page and the block that did not do what the page says.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    runners = {"bash": partial(_bash, short=short or {}), "console": _console, "python": _python, "pycon": _pycon}
    ran = 0
    for number, (language, code) in enumerate(blocks(page), 1):
        if language in runners:
            runners[language](code, f"{page.name}, block {number}", names)
            ran += 1
    return ran


def pictures(page: Path) -> list[tuple[Path, Path]]:
    """(the file that the commands of the page make, the picture that the page shows) for each one marked so."""
    return [(Path(made), page.parent / shown) for shown, made in MADE.findall(page.read_text(encoding="utf-8"))]


def _bash(code: str, where: str, names: dict[str, Any], *, short: Mapping[str, str]) -> None:
    for command in code.replace("\\\n", " ").splitlines():
        if command.strip() and not command.startswith("#"):
            more = next((flags for start, flags in short.items() if command.startswith(start)), "")
            status, output = execute(f"{command} {more}")
            assert status == 0, f"{where}: {command}\n{output}"


def _console(code: str, where: str, names: dict[str, Any]) -> None:
    for part in re.split(r"^\$ ", code.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        _compare(expected, execute(command)[1], f"{where}: {command}")


def _python(code: str, where: str, names: dict[str, Any]) -> None:
    exec(compile(code, where, "exec"), names)


def _pycon(code: str, where: str, names: dict[str, Any]) -> None:
    for example in doctest.DocTestParser().get_examples(code):
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(example.source, where, "single"), names)
        _compare(example.want, output.getvalue(), f"{where}: {example.source.strip()}")


def _compare(expected: str, actual: str, where: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(expected.strip() + "\n", actual.strip() + "\n", flags)
    assert same, f"{where}\nthe page shows\n{expected}\nit printed\n{actual}"


def execute(command: str) -> tuple[int, str]:
    """(exit status, standard output and standard error together); ``untwine ... > FILE`` works as in a shell."""
    words = shlex.split(command, comments=True)
    if words[0] != "untwine":
        installed = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": installed}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
        return done.returncode, done.stdout + done.stderr
    target = Path(words.pop(-1)) if words[-2:-1] == [">"] and words.pop(-2) else None
    both, out = io.StringIO(), io.StringIO()
    with redirect_stderr(both), redirect_stdout(out if target else both):
        try:
            status = main(words[1:])
        except SystemExit as end:
            status = int(end.code or 0)
    if target:
        target.write_text(out.getvalue(), encoding="utf-8")
    logging.getLogger("untwine").handlers.clear()
    sys.stderr.flush()
    return status, both.getvalue()
