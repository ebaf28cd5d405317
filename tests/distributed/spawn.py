"""Runs a function in several processes joined by gloo, as torchrun would launch them."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from untwine.training.distributed import Distributed


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``[fn(processes, *args) of rank 0, of rank 1, ...]``; ``fn`` must be importable, its results picklable.

    An exception of any rank is raised here, with that rank's traceback, and ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_rank, (fn, world_size, port, folder, args), nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(rank: int, fn: Callable[..., Any], world_size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = Distributed.start("cpu", timeout_seconds=60)
    try:
        result = fn(processes, *args)
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    finally:
        processes.close()
