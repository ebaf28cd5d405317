"""What the verbs share: fixed options by tyro, and the rest as flags of a recipe or of the sampling settings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse(options: type[T], verb: str, args: Sequence[str]) -> T:
    """The options of a verb that has no others."""
    import tyro

    return tyro.cli(options, prog=f"untwine {verb}", args=list(args))


def parse_known(options: type[T], verb: str, args: Sequence[str], also: str) -> tuple[T, list[str]]:
    """The options of a verb, and the arguments that are not among them; ``also`` tells in the help what those may be."""
    import tyro

    wants_help = any(arg in ("-h", "--help") for arg in args)
    positional = [arg for arg in args if not arg.startswith("-")]
    if wants_help and not positional:
        tyro.cli(options, prog=f"untwine {verb}", args=["--help"], description=f"{options.__doc__}\n\n{also}")
    kept = [arg for arg in args if arg not in ("-h", "--help")]
    known, rest = tyro.cli(options, prog=f"untwine {verb}", args=kept, return_unknown_args=True)
    return known, rest + (["--help"] if wants_help else [])


def log_to_console() -> None:
    """Progress lines on standard error, from the main process only."""
    import logging
    import os

    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("untwine")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def show(title: str, rows: dict[str, Any]) -> None:
    """A two-column table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(str(name), str(value))
    Console(soft_wrap=True).print(table)
