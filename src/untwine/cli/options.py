"""What the verbs share: fixed options by tyro, and the rest as flags of a recipe or of the sampling settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar

T = TypeVar("T")


def parse(options: type[T], verb: str, args: Sequence[str]) -> T:
    """The options of a verb that has no others."""
    import tyro

    return tyro.cli(options, prog=f"untwine {verb}", args=list(args))


def parse_known(options: type[T], verb: str, args: Sequence[str], also: str) -> tuple[T, list[str]]:
    """The options of a verb, and the arguments that are not among them; ``also`` tells in the help what those may be.

    The first option is positional. It comes first, or after known options only: behind an unknown flag it could not be
    told from that flag's value.
    """
    import tyro

    named = bool(args) and not args[0].startswith("-")
    wants_help = any(arg in ("-h", "--help") for arg in args)
    if wants_help and not named:
        tyro.cli(options, prog=f"untwine {verb}", args=["--help"], description=f"{options.__doc__}\n\n{also}")
    kept = [arg for arg in args if arg not in ("-h", "--help")]
    known, rest = tyro.cli(
        options, prog=f"untwine {verb}", args=kept if named else ["", *kept], return_unknown_args=True
    )
    if not named:
        first = fields(options)[0]  # type: ignore[arg-type]
        name = rest.pop(0) if rest and not rest[0].startswith("-") else first.default
        if name is MISSING:
            raise ValueError(f"{first.name.upper()} is missing; write untwine {verb} {first.name.upper()} [OPTIONS]")
        known = replace(known, **{first.name: name})  # type: ignore[type-var]
    if kinds := [arg for arg in rest if arg.startswith("--") and arg.partition("=")[0].endswith(".kind")]:
        raise ValueError(
            f"{kinds[0]}: flags do not choose kinds; change the kind in a copy of the recipe "
            f"(untwine train {args[0]} --print-config > mine.yaml), or the solver of a sampling with --solver"
        )
    return known, rest + (["--help"] if wants_help else [])


def log_to_console() -> None:
    """Progress lines on standard error, from the main process only."""
    import logging
    import os

    class Console(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(self.format(record), file=sys.stderr)  # whatever standard error is by then

    logger = logging.getLogger("untwine")
    logger.handlers[:] = [Console()]
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)


def show(title: str, rows: Mapping[str, Any]) -> None:
    """A title and aligned ``name  value`` lines on standard output."""
    width = max(map(len, rows))
    print(title)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


def brief(settings: Mapping[str, Any]) -> str:
    """Plain data on one line: ``solver euler, num_inference_steps 50``."""
    told = {k: v["kind"] if isinstance(v, Mapping) and "kind" in v else v for k, v in settings.items()}
    return ", ".join(f"{k} {v}" for k, v in told.items() if v is not None)
