"""Faults done to training runs, and what was lost: the table behind "a run survives" (``make faults``).

    python benchmarks/kill_resume.py       # twenty kills; its result is the first row
    python benchmarks/faults.py            # the others, some minutes

A kill inside a checkpoint write is made at every storage operation of a save, and at each in the middle of it; disks
fill up by an injected ENOSPC; signals and SIGKILL go to real processes, of which two are joined by gloo where one of
them meets a NaN, is killed or hangs. ``survived`` counts the runs that went on to the state of an uninterrupted run,
bit for bit; ``refused`` those of what must not be accepted.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, save

sys.path.insert(0, str(ROOT))
from fault_files import ROWS
from kill_resume import COMMON
from tests.faults.test_interrupted_saves import Crash, Failing
from tests.faults.test_lost_rank import EVERY, PATIENCE, STEPS, launch, lose_rank, newest, wait_for
from tests.tiny import tiny

from untwine.training import checkpoint
from untwine.training.nonfinite import TrainingDiverged
from untwine.training.saving import SavingFailed
from untwine.training.trainer import Trainer

RECIPE = {"train.num_steps": STEPS, "train.save_every": EVERY}


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.networks.tensors().items()}


def finished(folder: Path, changes: dict[str, Any] = RECIPE) -> dict[str, torch.Tensor]:
    """The state at the end of a run that is started, or continued, without faults."""
    trainer = Trainer(tiny(**changes), folder)
    trainer.fit()
    return tensors(trainer)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupted_saves(work: Path, whole: dict[str, torch.Tensor], crash: bool) -> dict[str, Any]:
    """A crash (or a failure) at every storage operation of the save at step 6, the one at step 3 being there."""
    base = work / "base"
    if not base.exists():
        Trainer(tiny(**RECIPE), base).fit(until=EVERY)
    recovered, lost = [], []
    for healthy in itertools.count():
        folder = work / f"{'crash' if crash else 'failure'}-{healthy}"
        shutil.copytree(base, folder)
        trainer, storage = Trainer(tiny(**RECIPE), folder), Failing(healthy, crash)

        def arm(step: int, trainer: Trainer = trainer, storage: Failing = storage) -> None:
            if step == 2 * EVERY - 1:
                trainer.keeper.storage = storage

        with suppress(Crash, SavingFailed):
            trainer.fit(until=2 * EVERY, on_step=arm)
        if storage.calls <= healthy:
            break
        lost.append(trainer.step - newest(folder))
        recovered.append(equal(finished(folder), whole))
        shutil.rmtree(folder)
    return {"runs": len(recovered), "survived": sum(recovered), "steps_lost": max(lost)}


def full_disk(work: Path, whole: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Full at the first two saves: training goes on. Full for good: it stops after three, and continues afterwards."""
    from tests.faults.test_surviving import Full

    passing = Trainer(tiny(**RECIPE), work / "passing")
    passing.storage = Full(1, 2)
    passing.fit()
    stopped = Trainer(tiny(**RECIPE), work / "stopped")
    stopped.storage = Full(2, 3, 4)
    message = ""
    try:
        stopped.fit()
    except SavingFailed as error:
        message = str(error)
    lost = stopped.step - newest(work / "stopped")
    recovered = equal(tensors(passing), whole) + equal(finished(work / "stopped"), whole)
    return {"runs": 2, "survived": recovered, "steps_lost": lost, "names_bytes": "needed" in message}


def signalled(work: Path, whole: dict[str, torch.Tensor], number: int) -> dict[str, Any]:
    folder = work / signal.Signals(number).name
    (process,) = launch(folder, RECIPE)
    last = 0
    for line in process.stdout or ():
        last = int(line)
        if last == 5:
            break
    sent = time.perf_counter()
    os.killpg(process.pid, number)
    told = process.communicate(timeout=120)[0].split()
    seconds = time.perf_counter() - sent
    last = int(told[-1]) if told else last
    lost = last - max(0, newest(folder))
    return {
        "runs": 1,
        "survived": int(equal(finished(folder), whole)),
        "steps_lost": lost,
        "exit_status": process.returncode if process.returncode >= 0 else 128 - process.returncode,
        "worst_seconds": round(seconds, 2),
    }


def lost_rank(work: Path, number: int) -> dict[str, Any]:
    status, same, lost, seconds = lose_rank(work, number)
    return {"runs": 1, "survived": int(same and status > 0), "steps_lost": lost, "worst_seconds": round(seconds, 2)}


def nan_on_one_rank(work: Path) -> dict[str, Any]:
    """Two processes; the second meets a NaN at the sixth step."""
    from tests.faults.poison import register

    register()
    objective = {"kind": "test_poisoned", "counter": 5 * 16 + 13}
    changes = {**RECIPE, "objective": objective}
    ends = [
        wait_for(launch(work / name, changes, ranks=2, until=until)) for name, until in (("before", 5), ("nan", None))
    ]
    before, again = (Trainer(tiny(**changes), work / name) for name in ("before", "nan"))
    checkpoint.load(work / "before" / "checkpoints" / "step-5", before.networks.tensors())
    stopped = all(TrainingDiverged.__name__ in stderr and code for stderr, code in ends[1])
    losses = again.replay(work / "nan" / "nonfinite-step-5.json")
    return {
        "runs": 1,
        "survived": int(stopped and equal(tensors(before), tensors(again))),
        "steps_lost": 5 - newest(work / "nan"),
        "dump_replays_it": [bool(loss.total.isfinite()) for loss in losses] == [True, False],
    }


def kills() -> list[dict[str, Any]]:
    """The row of ``kill_resume.py``, if it has been run."""
    file = RESULTS / "kill_resume.json"
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    told = {
        "runs": found["kills"],
        "survived": sum(r["kills"] for r in found["rounds"] if not r["different"]),
        "steps_lost": max(lost for r in found["rounds"] for lost in r["steps_lost"]),
    }
    return [{"fault": "SIGKILL at random moments", **told, "commit": found["commit"]}]


def main() -> None:
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="untwine-faults-"))
    try:
        whole = finished(work / "whole")
        cases: dict[str, Callable[[], dict[str, Any]]] = {
            "crash at every storage operation of a save": lambda: interrupted_saves(work, whole, crash=True),
            "failure (ENOSPC) at every storage operation": lambda: interrupted_saves(work, whole, crash=False),
            "disk full, for two saves and for good": lambda: full_disk(work, whole),
            "SIGTERM": lambda: signalled(work, whole, signal.SIGTERM),
            "SIGINT": lambda: signalled(work, whole, signal.SIGINT),
            "SIGKILL": lambda: signalled(work, whole, signal.SIGKILL),
            "NaN on one of two ranks": lambda: nan_on_one_rank(work),
            "SIGKILL to one of two ranks": lambda: lost_rank(work, signal.SIGKILL),
            f"one of two ranks hangs, time-out {PATIENCE:g} s": lambda: lost_rank(work, signal.SIGSTOP),
        }
        for number, (name, damage) in enumerate(ROWS.items()):
            folder = work / f"files-{number}"
            folder.mkdir()
            cases[name] = lambda damage=damage, folder=folder: damage(folder)
        rows = kills()
        for name, run in cases.items():
            started = time.perf_counter()
            rows.append({"fault": name, **run(), "seconds": round(time.perf_counter() - started, 1)})
            print(rows[-1], flush=True)
        about = {"steps": STEPS, "save_every": EVERY, "kills_save_every": COMMON["train.save_every"]}
        save("faults", {**about, "errno": errno.errorcode[errno.ENOSPC], "rows": rows})
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
