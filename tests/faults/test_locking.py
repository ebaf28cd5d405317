"""Two runs, one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from untwine.training.checkpoint import (
    CheckpointError,
)
from untwine.training.locking import FolderInUse, lock


def test_a_live_run_keeps_its_folder(root):
    code = f"from untwine.training.locking import lock\nwith lock({str(root)!r}): print('in', flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "in\n"
    with pytest.raises(FolderInUse, match=f"process {owner.pid}"), lock(root):
        pass
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    with lock(root), pytest.raises(FolderInUse, match=f"process {os.getpid()}"), lock(root):
        pass
    owner.communicate()
    assert not list(root.iterdir())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", json.dumps({"pid": os.getpid(), "started": "1", "host": os.uname()[1]})],
    ids=["empty", "cut", "no object", "pid of another process"],
)
def test_a_stale_lock_is_taken_over(root, text):
    """Also that of a dead process whose number somebody else has now."""
    root.mkdir()
    (root / "run.lock").write_text(text)
    with lock(root):
        assert json.loads((root / "run.lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_another_machine_stays(root):
    root.mkdir()
    (root / "run.lock").write_text(json.dumps({"pid": 1, "started": "1", "host": "elsewhere"}))
    with pytest.raises(FolderInUse, match="on elsewhere; if it is dead, remove"), lock(root):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*; choose another folder"), lock(tmp_path / "file"):
        pass
