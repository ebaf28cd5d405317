"""A run that is interrupted ends, bit for bit, where an uninterrupted one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.tiny import tiny
from untwine.training import checkpoint
from untwine.training.metering import read_log
from untwine.training.trainer import Trainer

MUON = {"kind": "muon", "lr": 2e-2, "rest": {"kind": "adamw", "lr": 1e-3}}
PROJECTOR = {"kind": "flow_matching", "terms": [{"kind": "test_projector"}]}
RUNS = {
    "adamw": {},
    "muon": {"optimizer": MUON},
    "accumulation": {"train.accumulation": 2, "train.clip_norm": 0.5},
    "bf16": {"train.parallel": {"param_dtype": "bfloat16"}, "train.accumulation": 2},
    "own parameters": {"objective": PROJECTOR},
    "two networks, 2:1": {"objective": {"kind": "test_two_networks", "teacher": True}},
    "all of it": {
        "optimizer": MUON,
        "objective": PROJECTOR,
        "train.accumulation": 2,
        "train.parallel": {"param_dtype": "bfloat16", "checkpointing": True},
    },
}


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.networks.tensors().items()}


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ: {different[:5]}"


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_resumed_equals_uninterrupted(tmp_path, changes):
    # 97 training samples: the run of 144 crosses the end of an epoch.
    recipe = tiny(**{"train.validation": 1700, "train.num_steps": 9, **changes})
    whole = Trainer(recipe, tmp_path / "whole")
    start = _state(whole)
    whole.fit()
    parts = Trainer(recipe, tmp_path / "parts")
    parts.fit(until=4)
    assert checkpoint.latest(tmp_path / "parts" / "checkpoints").name == "step-4"
    for until in (5, None):
        parts = Trainer(recipe, tmp_path / "parts")
        result = parts.fit(until=until)
    assert result.step == 9
    assert parts.networks.updates == whole.networks.updates
    _assert_same(_state(whole), _state(parts))
    moved = [
        n
        for n, value in _state(whole).items()
        if n.startswith(("model.", "objective.", "critic.")) and not torch.equal(value, start[n])
    ]
    assert len(moved) > 0.8 * sum(n.startswith(("model.", "objective.", "critic.")) for n in start)
    assert _last_line(tmp_path / "whole") == _last_line(tmp_path / "parts")


def _last_line(folder) -> dict:
    """The last validation, which saw the same held-out triples."""
    line = read_log(folder / "log.jsonl", "validation")[-1]
    return {name: value for name, value in line.items() if name != "seconds"}


def test_workers_change_nothing(tmp_path):
    one = Trainer(tiny(**{"train.num_steps": 3}), tmp_path / "0")
    one.fit()
    two = Trainer(tiny(**{"train.num_steps": 3, "train.num_workers": 2}), tmp_path / "2")
    two.fit()
    _assert_same(_state(one), _state(two))


def test_accumulation_changes_only_rounding(tmp_path):
    one, two = (Trainer(tiny(**{"train.num_steps": 4, "train.accumulation": n}), tmp_path / str(n)) for n in (1, 4))
    one.fit()
    two.fit()
    a, b = (torch.cat([p.flatten() for p in t.networks.model.parameters()]) for t in (one, two))
    assert (a - b).norm() / a.norm() < 1e-5


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from tests.tiny import tiny
from untwine.training.trainer import Trainer
recipe = tiny(**{"train.num_steps": 14, "train.save_every": 2, "train.accumulation": 2, "train.num_workers": 2})
Trainer(recipe, sys.argv[1]).fit(on_step=lambda step: print(step, flush=True))
print("done", flush=True)
"""


def _launch(folder):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_kill_9_and_resume(tmp_path):
    """Killed with SIGKILL three times at odd moments; ``make proofs`` does it at twenty random ones."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipe = tiny(**{"train.num_steps": 14, "train.save_every": 2, "train.accumulation": 2, "train.num_workers": 2})
        whole = Trainer(recipe, tmp_path / "whole")
        whole.fit()
        for kill_after, delay in ((3, 0.0), (6, 0.013), (11, 0.04)):
            process = _launch(tmp_path / "killed")
            for line in process.stdout:
                if line.strip() == "done" or int(line) >= kill_after:
                    break
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process = _launch(tmp_path / "killed")
        assert "done" in process.communicate(timeout=120)[0]
        last = Trainer(recipe, tmp_path / "killed")
        result = last.fit()
        assert result.step == 14
        _assert_same(_state(whole), _state(last))
    finally:
        torch.set_num_threads(torch_threads)


def test_another_run_in_the_folder_is_refused(tmp_path):
    Trainer(tiny(**{"train.num_steps": 1}), tmp_path).fit()
    with pytest.raises(ValueError, match=r"another run.*\n  optimizer.lr: 0.001 -> 0.002"):
        Trainer(tiny(**{"train.num_steps": 2, "optimizer.lr": 2e-3}), tmp_path).fit()
    more = Trainer(tiny(**{"train.num_steps": 2, "train.log_every": 1}), tmp_path).fit()
    assert more.step == 2


def test_unwritable_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        Trainer(tiny(), tmp_path / "file" / "run").fit()
