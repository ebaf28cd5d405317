"""A disk that fails and a process that dies, at every operation of a save."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.checkpoints import check_loads, put, tensors
from untwine.training.checkpoint import (
    CheckpointNotSaved,
    latest,
    load,
    read_state,
    recover,
    save,
    verify,
)
from untwine.training.storage import Storage


class Crash(BaseException):
    """The process is gone: nothing after it runs."""


class Failing(Storage):
    """Does what it should ``healthy`` times, then half of the next operation, then fails or crashes."""

    def __init__(self, healthy: int, crash: bool) -> None:
        self.healthy, self.crash, self.calls = healthy, crash, 0

    def _call(self, operation, half, *args):
        self.calls += 1
        if self.crash and self.calls > self.healthy:
            if self.calls == self.healthy + 1:
                half(*args)
            raise Crash
        if self.calls == self.healthy + 1:
            half(*args)
            raise OSError(errno.ENOSPC, "No space left on device")
        return operation(*args)

    def make(self, folder):
        return self._call(super().make, super().make, folder)

    def write(self, path, data):
        return self._call(super().write, lambda path, data: path.write_bytes(data[: len(data) // 2]), path, data)

    def write_tensors(self, folder, tensors):
        def half(folder, tensors):
            Storage.write_tensors(self, folder, tensors)
            for file in folder.glob("*.safetensors"):
                os.truncate(file, file.stat().st_size // 2)

        return self._call(super().write_tensors, half, folder, tensors)

    def rename(self, source, target):
        return self._call(super().rename, lambda *_: None, source, target)

    def sync(self, folder):
        return self._call(super().sync, lambda _: None, folder)

    def list(self, folder):
        return self._call(super().list, lambda _: None, folder)

    def delete(self, folder):
        return self._call(super().delete, lambda folder: next(iter(sorted(folder.iterdir()))).unlink(), folder)

    def free(self, folder):
        return self._call(super().free, lambda _: None, folder)


class Noting(Storage):
    """Notes what is done to which name."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def write_tensors(self, folder, tensors):
        self.notes.append(("write", "tensors"))
        super().write_tensors(folder, tensors)

    def write(self, path, data):
        self.notes.append(("write", path.name))
        super().write(path, data)

    def sync(self, folder):
        self.notes.append(("sync", folder.name.partition(".tmp")[0]))
        super().sync(folder)

    def rename(self, source, target):
        self.notes.append(("rename", target.name))
        super().rename(source, target)

    def delete(self, folder):
        self.notes.append(("delete", folder.name.partition(".tmp")[0]))
        super().delete(folder)


def test_what_a_power_cut_may_take_is_flushed_first(root):
    """The manifest after everything it lists, the rename after the folder, the old checkpoint after the new name."""
    put(root, 1)
    put(root, 2)
    storage = Noting()
    put(root, 3, storage=storage)
    assert storage.notes[0] == ("write", "tensors")
    assert storage.notes[3:7] == [("write", "manifest.json"), ("sync", "step-3"), ("rename", "step-3"), ("sync", "run")]
    assert storage.notes[-1] == ("delete", "step-1")


def prepared(root: Path, replace: bool) -> tuple[int, set[int]]:
    """Two checkpoints; the step saved next, and the steps that may be newest afterwards."""
    put(root, 1)
    put(root, 2)
    return (2, {2}) if replace else (3, {2, 3})


@pytest.mark.parametrize("replace", [False, True], ids=["new step", "same step again"])
@pytest.mark.parametrize("crash", [True, False], ids=["crash", "failure"])
def test_a_save_interrupted_at_every_operation(tmp_path, crash, replace):
    interrupted = 0
    for healthy in itertools.count():
        root = tmp_path / str(healthy)
        step, allowed = prepared(root, replace)
        storage = Failing(healthy, crash)
        try:
            put(root, step, storage=storage)
        except Crash:
            assert crash
        except CheckpointNotSaved as error:
            assert (crash, error.needed > 0, "No space left" in error.reason) == (False, True, True)  # noqa: PT017
            assert check_loads(latest(root)) in allowed, "without a restart"
        if storage.calls <= healthy:
            break
        interrupted += 1
        recover(root)
        assert check_loads(latest(root)) in allowed
        assert all(verify(folder) for folder in root.iterdir()), "no half folder under a checkpoint's name"
        put(root, 4)
        assert not list(root.glob("*.tmp-*"))
        assert check_loads(latest(root)) == 4
    assert interrupted >= 12


def test_a_recovery_interrupted_at_every_operation(tmp_path):
    for healthy in itertools.count():
        root = tmp_path / str(healthy)
        put(root, 1)
        put(root, 2).rename(root / "step-2.tmp-a0")
        shutil.copytree(root / "step-1", root / "step-3.tmp-a1")
        (root / "step-3.tmp-a1" / "manifest.json").unlink()
        storage = Failing(healthy, crash=True)
        try:
            recover(root, storage=storage)
        except Crash:
            recover(root)
        assert sorted(p.name for p in root.iterdir()) == ["step-1", "step-2"]
        assert check_loads(latest(root)) == 2
        if storage.calls <= healthy:
            break


def test_space_is_checked_before_anything_is_written(root):
    put(root, 1)

    class Small(Storage):
        def free(self, folder):
            return 10

        def write_tensors(self, folder, tensors):
            raise AssertionError("written without room")

    with pytest.raises(CheckpointNotSaved, match=r"needed \d+ bytes, free 10 bytes") as caught:
        put(root, 2, storage=Small())
    assert caught.value.needed >= 1.2 * sum(t.nbytes for t in tensors(2).values())
    assert [p.name for p in root.iterdir()] == ["step-1"]


def test_a_real_full_file_system(root):
    """A limit on the size of files stops the writer inside the tensor file."""
    put(root, 1)
    code = f"""
import resource, signal, torch
from pathlib import Path
from untwine.training.checkpoint import CheckpointNotSaved, save, verify
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save({str(root)!r}, 2, {{"a": torch.ones(10000)}}, {{}}, config={{}})
except CheckpointNotSaved as error:
    print(error.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert [p.name for p in root.iterdir()] == ["step-1"]
    assert check_loads(root / "step-1") == 1


def save_forever(root: Path, committed) -> None:
    for step in itertools.count(1):
        save(root, step, {"a": torch.full((20000,), step)}, {"step": step}, config={})
        committed.send(step)


def test_kill_nine_while_saving(tmp_path):
    """Thirty real kills at random moments, each followed by what the next start does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([save_forever.__module__])
    rng = random.Random(0)
    torn = 0
    for kill in range(30):
        root = tmp_path / str(kill)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(root, theirs))
        process.start()
        committed = [ours.recv() for _ in range(2)]
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        while ours.poll():
            committed.append(ours.recv())
        torn += bool(list(root.glob("*.tmp-*")))
        recover(root)
        newest = latest(root)
        filled = {"a": torch.zeros(20000, dtype=torch.int64)}
        load(newest, filled)
        step = read_state(newest)["step"]
        assert step >= max(committed)
        assert (filled["a"] == step).all()
        assert not list(root.glob("*.tmp-*"))
    assert torn, "some kills must have hit a save in the middle"
