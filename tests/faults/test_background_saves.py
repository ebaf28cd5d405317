"""Saves in the background: the state of their own step, and no less safe than the others."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny
from untwine.training import checkpoint
from untwine.training.saving import SavingFailed
from untwine.training.storage import Storage
from untwine.training.trainer import Trainer

PLAN = {"train.save_every": 3, "train.keep": 4}


def stored(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Every checkpoint of a run by name, as it lies on disk."""
    files = sorted((folder / "checkpoints").glob("step-*/*.safetensors"))
    return {file.parent.name: load_file(file) for file in files}


class Slow(Storage):
    """Writes tensors only when it is let."""

    def __init__(self) -> None:
        self.let, self.waited = threading.Event(), []

    def write_tensors(self, folder, tensors):
        self.waited.append(self.let.wait(20))
        super().write_tensors(folder, tensors)


class Full(Storage):
    """A disk without room for the first ``refused`` checkpoints."""

    def __init__(self, refused: int) -> None:
        self.refused = refused

    def write_tensors(self, folder, tensors):
        self.refused -= 1
        if self.refused >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_tensors(folder, tensors)


def test_training_goes_on_while_the_state_of_its_step_is_written(tmp_path):
    Trainer(tiny(**PLAN), tmp_path / "waiting").fit()
    trainer = Trainer(tiny(**PLAN, **{"train.async_save": True}), tmp_path / "background")
    slow = trainer.storage = Slow()
    trainer.fit(on_step=lambda step: slow.let.set() if step == 5 else None)
    assert slow.waited[0]
    expected, found = stored(tmp_path / "waiting"), stored(tmp_path / "background")
    assert len(expected) == 3
    assert expected.keys() == found.keys()
    for step, tensors in expected.items():
        assert tensors.keys() == found[step].keys()
        assert not [name for name in tensors if not torch.equal(tensors[name], found[step][name])], step


def test_a_full_disk_is_told_and_tried_again(tmp_path, caplog):
    trainer = Trainer(tiny(**PLAN, **{"train.async_save": True}), tmp_path)
    trainer.storage = Full(2)
    trainer.fit()
    assert caplog.text.count("checkpoint not saved") == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-8"]


def test_the_third_failure_stops_the_run(tmp_path):
    trainer = Trainer(tiny(**PLAN, **{"train.async_save": True}), tmp_path)
    trainer.storage = Full(9)
    with pytest.raises(SavingFailed, match="3 in a row have failed"):
        trainer.fit()
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "run.lock").exists()


PROGRAM = """
import os, signal, sys, torch
torch.set_num_threads(1)
from tests.tiny import tiny
from untwine.training.storage import Storage
from untwine.training.trainer import Trainer
class Deadly(Storage):
    def write_tensors(self, folder, tensors):
        super().write_tensors(folder, tensors)
        if folder.name.startswith("step-6"):
            os.kill(os.getpid(), signal.SIGKILL)
trainer = Trainer(tiny(**{"train.save_every": 3, "train.keep": 4, "train.async_save": True}), sys.argv[1])
trainer.storage = Deadly()
trainer.fit()
"""


def test_killed_while_writing_it_continues_from_the_save_before(tmp_path):
    whole = Trainer(tiny(**PLAN), tmp_path / "whole")
    whole.fit()
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status = subprocess.run([sys.executable, "-c", PROGRAM, str(run)], env=environment, capture_output=True, text=True)
    assert status.returncode == -signal.SIGKILL, status.stderr
    assert checkpoint.latest(run / "checkpoints").name == "step-3"
    assert len(list((run / "checkpoints").glob("step-6.tmp-*"))) == 1
    again = Trainer(tiny(**PLAN), run)
    again.fit()
    expected, found = whole.networks.tensors(), again.networks.tensors()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not list((run / "checkpoints").glob("*.tmp-*"))
