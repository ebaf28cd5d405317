"""``untwine app``: the studio, a page in the browser."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, arg

from untwine.app.limits import Limits
from untwine.cli.options import log_to_console, parse


@dataclass(frozen=True)
class AppOptions:
    """Opens the studio in the browser: make pictures, see them form, compare exact with accelerated, watch runs."""

    root: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """whose saved pipelines can be chosen beside the shipped checkpoints"""
    runs: Annotated[Path, arg(metavar="FOLDER")] = Path("runs")
    """runs to watch, whose checkpoints can be chosen as well"""
    results: Annotated[Path, arg(metavar="FOLDER")] = Path("benchmarks/results")
    """benchmark results to show"""
    outputs: Annotated[Path, arg(metavar="FOLDER")] = Path("out/app")
    """for what is made; the oldest goes first"""
    host: str = "127.0.0.1"
    """address to listen at; any other than this machine's own needs --auth"""
    port: int = 7860
    auth: Annotated[str | None, arg(metavar="USER:PASSWORD")] = None
    """what the page asks for"""
    share: FlagCreatePairsOff[bool] = False
    """a public address through Gradio's tunnel; needs --auth"""
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)


def run(args: list[str]) -> int:
    """The verb."""
    options = parse(AppOptions, "app", args)

    from untwine.app import launch

    log_to_console()
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    user, _, password = (options.auth or "").partition(":")
    server = launch(**{**given, "auth": (user, password) if options.auth is not None else None})
    print(f"untwine studio: {server.url} (Ctrl-C ends it)", flush=True)
    if server.share_url:
        print(f"for others: {server.share_url}", flush=True)
    server.wait()
    return 0
