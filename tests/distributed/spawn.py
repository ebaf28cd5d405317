"""Runs a function in several processes joined by gloo, as torchrun would launch them."""

from __future__ import annotations

import atexit
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp

from untwine.training.distributed import Distributed

TIMEOUT_SECONDS = 120
_pools: dict[int, Pool] = {}


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``[fn(processes, *args) of rank 0, of rank 1, ...]``; ``fn`` must be importable, its results picklable.

    The processes stay for the next call with this number of them. An exception of any rank is raised here with that
    rank's traceback; the processes are then replaced, since the others may wait for it.
    """
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    try:
        return _pools[world_size].run(fn, args)
    except BaseException:
        close()
        raise


def close() -> None:
    """Ends the processes of earlier calls."""
    while _pools:
        _pools.popitem()[1].close()


class Pool:
    """Ranks that wait for functions."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        pairs = [context.Pipe() for _ in range(world_size)]
        self.connections = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for connection in self.connections:
            connection.send((fn, args))
        results: dict[Any, Any] = {}
        while waiting := [c for c in self.connections if c not in results]:
            ready = wait(waiting, TIMEOUT_SECONDS)
            if not ready:
                raise TimeoutError(f"ranks {[self.connections.index(c) for c in waiting]} did not answer")
            for connection in ready:
                results[connection], error = connection.recv()
                if error:
                    raise RuntimeError(f"rank {self.connections.index(connection)} failed:\n{error}")
        return [results[connection] for connection in self.connections]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join(5)


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = Distributed.start("cpu", timeout_seconds=60)
    while True:
        fn, args = connection.recv()
        try:
            answer = (fn(processes, *args), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        connection.send(answer)


atexit.register(close)
