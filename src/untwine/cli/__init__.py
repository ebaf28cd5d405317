"""``untwine VERB``: one file a verb. Help is read from static tables and imports neither torch nor diffusers."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import untwine

VERBS = {
    "train": "train a recipe, or continue its run",
    "sample": "draw images from a checkpoint into a folder",
    "accelerate": "choose when a decoupled model runs its encoder, and write a plan",
    "data": "prepare data: the emoji pictures, or a cache of the latents of a recipe",
    "convert": "turn official weights, or a run, into a pipeline folder that loads anywhere",
    "evaluate": "compare samples, or those of a checkpoint, with real pictures: FD, KID, precision, copies",
    "bench": "measure quality against steps or guidance, and draw losses and results",
    "plan": "say what a recipe needs in memory, arithmetic and time on given devices",
    "app": "open the studio: a page in the browser to draw, watch, compare and measure",
    "info": "what there is: models, recipes, solvers, checkpoints; or one of them in detail",
}
_USAGE = """usage: untwine VERB ...

{verbs}

untwine VERB --help shows the options of a verb; untwine --version the version.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; the exit status is 0, 2 for a user's error, 130 for an interruption."""
    args = sys.argv[1:] if argv is None else list(argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_USAGE.format(verbs="\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())))
        return 0
    if args[0] in ("-V", "--version"):
        print(f"untwine {untwine.__version__}")
        return 0
    if args[0] not in VERBS:
        from untwine.registry import did_you_mean

        print(f"untwine: unknown verb {args[0]!r}{did_you_mean(args[0], VERBS)}", file=sys.stderr)
        return 2
    return _run(*args)


def _run(verb: str, *args: str) -> int:
    """One verb, with a user's errors told in a line instead of a traceback."""
    try:
        status = import_module(f"untwine.cli.{verb}").run(list(args))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"untwine {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("UNTWINE_TRACEBACK"):
            raise
        told = isinstance(error, ValueError) or type(error).__module__.startswith("untwine")
        hint = "" if told else " (UNTWINE_TRACEBACK=1 shows where)"
        print(f"untwine {verb}: {error}{hint}", file=sys.stderr)
        return 2
