"""One run a folder: a lock file that names the process holding it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from untwine.training.distributed import on_main, rank
from untwine.training.manifest import CheckpointError

LOCK = "run.lock"


class FolderInUse(CheckpointError):
    """Another live run writes into the folder."""


@contextmanager
def lock(root: str | Path) -> Iterator[None]:
    """Holds ``root`` for this run; entering is collective.

    The lock of a dead process is taken over. Whether a process of another machine lives cannot be seen from here; its
    lock must be removed by hand.

    Raises:
        FolderInUse: naming the process that holds the folder.
        CheckpointError: where the folder cannot be written.
    """
    root = Path(root)
    mine = on_main(lambda: _acquire(root))
    try:
        yield
    finally:
        if rank() == 0:  # not together: a process that failed must not wait here for the others
            _release(root, mine)


def _acquire(root: Path) -> dict[str, Any]:
    mine = {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}
    draft = root / f"{LOCK}.new"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            _check_free(root / LOCK)
            draft.write_text(json.dumps(mine))
            draft.replace(root / LOCK)
    except OSError as error:
        raise CheckpointError(f"{root} cannot be written: {error.strerror}; choose another folder") from error
    return mine


def _release(root: Path, mine: dict[str, Any]) -> None:
    if _holder(root / LOCK) == mine:
        (root / LOCK).unlink()


def _check_free(path: Path) -> None:
    holder = _holder(path)
    if holder is None:
        return
    elsewhere = holder["host"] != socket.gethostname()
    if elsewhere or _started(holder["pid"]) == holder["started"]:
        advice = f"if it is dead, remove {path}" if elsewhere else "stop it, or choose another folder"
        raise FolderInUse(f"{path.parent} is used by process {holder['pid']} on {holder['host']}; {advice}")


def _holder(path: Path) -> dict[str, Any] | None:
    """Who wrote the lock; None for no lock or one that this module did not write."""
    with suppress(FileNotFoundError, ValueError):
        holder = json.loads(path.read_text())
        if isinstance(holder, dict) and {"pid", "started", "host"} <= holder.keys():
            return holder
    return None


def _started(pid: int) -> str | None:
    """When a live process started, in the kernel's own unit; None for a dead one."""
    if Path("/proc/self/stat").exists():
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return fields[19] if fields[0] not in "ZX" else None
        return None
    with suppress(ProcessLookupError):
        with suppress(PermissionError):
            os.kill(pid, 0)
        return "unknown"
    return None


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Two runs that start at once look at the lock one after the other, where the file system can do that."""
    handle = os.open(root, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
