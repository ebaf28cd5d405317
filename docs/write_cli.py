"""Writes reference/cli.md: what ``--help`` prints, for each verb. Run it after a change of the command line."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path

PAGE = Path(__file__).parent / "reference" / "cli.md"
HEAD = """# Command line

`untwine VERB --help` prints what stands here. This page is written by `docs/write_cli.py`, and a test compares the two.

A user's error is one line on standard error and exit status 2; `UNTWINE_TRACEBACK=1` shows the traceback instead.
An interrupted command exits with 130, a training run that SIGTERM ended with 143.
"""
COMMANDS = (
    ("", "## All verbs"),
    ("train", "## train"),
    ("train folder", "### All flags of a recipe\n\nThe flags follow the recipe: this is the one for image folders."),
    ("sample", "## sample"),
    ("sample ddt-digits", "### All settings of a sampling"),
    ("data", "## data"),
    ("data encode", "### data encode"),
    ("data emoji", "### data emoji"),
    ("convert", "## convert"),
    ("evaluate", "## evaluate"),
    ("app", "## app"),
    ("accelerate", "## accelerate"),
    ("bench", "## bench"),
    ("bench quality", "### bench quality"),
    ("bench loss", "### bench loss"),
    ("bench plot", "### bench plot"),
    ("bench mup", "### bench mup"),
    ("plan", "## plan"),
    ("info", "## info"),
)


def help_of(command: str) -> str:
    """What ``untwine COMMAND --help`` prints, 84 columns wide."""
    from untwine.cli import main

    before, output = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "84"
    try:
        with redirect_stdout(output), suppress(SystemExit):
            main([*command.split(), "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return "\n".join(line.rstrip() for line in output.getvalue().strip().splitlines())


def page() -> str:
    """The whole page."""
    parts = [
        f"{title}\n\n```text\n$ {' '.join(['untwine', *command.split(), '--help'])}\n{help_of(command)}\n```\n"
        for command, title in COMMANDS
    ]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
