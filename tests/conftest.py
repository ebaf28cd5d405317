"""For every test: no network beyond this machine, one thread."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

_HERE = {"", "localhost", "::1", socket.gethostname()}


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, which nothing can take off again; Unix sockets and this machine (for gloo) are let through."""
    if event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else ""  # the address of a Unix socket is a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host or ""
    if name not in _HERE and not name.startswith("127."):
        raise RuntimeError(f"a test tried to reach {name!r}: tests touch no network")


sys.addaudithook(_refuse_network)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says aloud how many reference cases were not there."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if count := sum("PARITY NOT RUN" in reason for reason in skipped):
        terminalreporter.write_line(f"PARITY NOT RUN ({count})", red=True)
