"""The studio: a page in the browser on the pipelines. ``untwine app`` opens it; in a notebook, :func:`launch` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from untwine.app.limits import Limits

__all__ = ["Limits", "launch"]


def launch(
    *,
    root: str | Path | None = None,
    runs: str | Path = "runs",
    results: str | Path = "benchmarks/results",
    outputs: str | Path = "out/app",
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    share: bool = False,
    limits: Limits | None = None,
    block: bool = False,
) -> Any:
    """Opens the studio and returns its server, which has ``url`` and ``close()``.

    Args:
        root: folder whose saved pipelines can be chosen beside the shipped checkpoints.
        runs: folder of the runs to watch, whose checkpoints can be chosen as well.
        results: folder of benchmark results (JSON) to show.
        outputs: folder for what is made; the oldest goes when ``limits.max_output_mib`` is reached.
        host: address to listen at. Any other than this machine's own needs ``auth``.
        port: None = the first free one from 7860 on.
        auth: (user, password) that the page asks for.
        share: a public address through Gradio's tunnel; needs ``auth``.
        limits: what one request may ask for.
        block: wait until the server is stopped.

    Raises:
        ValueError: for a folder that is not there, or an address that others can reach, without ``auth``.
        ImportError: without Gradio: ``pip install untwine[app]``.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("the studio needs gradio: pip install untwine[app]") from error
    from untwine.app.server import check_reach, serve
    from untwine.app.studio import Studio

    check_reach(host, auth, share)
    studio = Studio(root=root, runs=runs, results=results, outputs=outputs, limits=limits or Limits())
    return serve(studio, host=host, port=port, auth=auth, share=share, block=block)
