"""A process of two that dies or hangs: the other one ends by itself, and the run goes on from its last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny
from untwine.training import checkpoint
from untwine.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
STEPS, EVERY, PATIENCE = 12, 3, 10.0
PROGRAM = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from tests.faults.poison import register
register()
from tests.tiny import tiny
from untwine.training.trainer import Trainer
trainer = Trainer(tiny(**json.loads(sys.argv[2])), sys.argv[1], device="cpu")
def heard(step):
    print(step, flush=True)
    if os.environ.get("LOST_AT") == f"{trainer.processes.rank}:{step}":
        os.kill(os.getpid(), int(os.environ["LOST_BY"]))
trainer.fit(until=json.loads(sys.argv[3]), on_step=heard)
"""


def launch(
    folder: Path, changes: dict[str, Any], ranks: int = 1, until: int | None = None, lost_by: int | None = None
) -> list[subprocess.Popen[str]]:
    """Starts a run; with ``lost_by`` the second process sends itself that signal at step 5."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    lost = {} if lost_by is None else {"LOST_AT": "1:5", "LOST_BY": str(int(lost_by))}
    env = {**os.environ, **lost, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(changes), json.dumps(until)]
    processes = []
    for rank in range(ranks):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        joined = {name: str(value) for name, value in group.items()} | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        own = env | (joined if ranks > 1 else {})
        processes.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=own
            )
        )
    return processes


def newest(folder: Path) -> int:
    path = checkpoint.latest(folder / "checkpoints")
    return -1 if path is None else int(path.name.removeprefix("step-"))


def wait_for(processes: list[subprocess.Popen[str]]) -> list[tuple[str, int]]:
    return [(process.communicate(timeout=120)[1], process.returncode) for process in processes]


def lose_rank(work: Path, number: int) -> tuple[int, bool, int, float]:
    """SIGKILL or SIGSTOP to the second of two processes at step 5; then both start again.

    Returns:
        the first one's exit status; whether the run ends bitwise as without the fault; steps lost; the seconds after
        which the first one ended.
    """
    name = signal.Signals(number).name
    changes = {"train.num_steps": STEPS, "train.save_every": EVERY, "train.timeouts": [120.0, PATIENCE]}
    uninterrupted, folder = work / f"{name}-none", work / name
    wait_for(launch(uninterrupted, changes, ranks=2))
    first, second = launch(folder, changes, ranks=2, lost_by=number)
    _, status = os.waitpid(second.pid, os.WUNTRACED)
    lost_at = time.perf_counter()
    ((_, code),) = wait_for([first])
    seconds = time.perf_counter() - lost_at
    if os.WIFSTOPPED(status):
        second.kill()
    second.communicate()
    lost = 5 - newest(folder)
    wait_for(launch(folder, changes, ranks=2))
    one, other = (Trainer(tiny(**changes), path) for path in (uninterrupted, folder))
    for trainer in (one, other):
        checkpoint.load(trainer.out / "checkpoints" / f"step-{STEPS}", trainer.networks.tensors())
    return code, _equal(*(t.networks.tensors() for t in (one, other))), lost, seconds


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_and_nothing_is_lost(number, tmp_path):
    status, same, lost, _ = lose_rank(tmp_path, number)
    assert status > 0 and same and lost <= EVERY
