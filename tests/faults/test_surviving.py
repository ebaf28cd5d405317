"""A run that meets a NaN, a signal or a full disk loses nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.faults.poison import register
from tests.tiny import tiny
from untwine.training import checkpoint
from untwine.training.control import StopSignals
from untwine.training.distributed import Distributed
from untwine.training.ema import PowerEMA
from untwine.training.metering import RunLog, read_log
from untwine.training.nonfinite import TrainingDiverged
from untwine.training.posthoc import fit, reconstruct
from untwine.training.saving import SavingFailed
from untwine.training.storage import Storage
from untwine.training.trainer import Trainer

BAD = 5 * 16 + 11
"""a sample of the sixth step, in the second of its two micro-batches"""


def poisoned(where: str, **changes):
    register()
    objective = {"kind": "test_poisoned", "counter": BAD, "where": where}
    return tiny(**{"objective": objective, "train.accumulation": 2, **changes})


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.networks.tensors().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_is_updated_by_a_nan(tmp_path, where):
    before = Trainer(poisoned(where), tmp_path / "before")
    before.fit(until=5)
    trainer = Trainer(poisoned(where), tmp_path / "run")
    with pytest.raises(TrainingDiverged, match=r"after step 5 .*nothing was updated.*nonfinite-step-5.json"):
        trainer.fit()
    assert trainer.step == 5
    assert_same(state(before), state(trainer))
    assert not any(p.grad is not None for p in trainer.networks.model.parameters())
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-5"


def test_the_dump_makes_it_happen_again(tmp_path):
    trainer = Trainer(poisoned("loss"), tmp_path)
    with pytest.raises(TrainingDiverged):
        trainer.fit()
    dump = json.loads((tmp_path / "nonfinite-step-5.json").read_text())
    assert (dump["step"], dump["seed"], dump["checkpoint"]) == (5, 3, "checkpoints/step-5")
    good, bad = dump["micro_batches"]
    assert good["index"] + bad["index"] == list(range(80, 96))
    assert bad["nonfinite"] == [BAD]
    assert bad["loss"] == "nan"
    assert all(0 <= t <= 1 for t in bad["t"])
    again = Trainer(poisoned("loss"), tmp_path)
    losses = again.replay(tmp_path / "nonfinite-step-5.json")
    assert [math.isfinite(float(loss.total)) for loss in losses] == [True, False]
    assert float(losses[0].total) == pytest.approx(good["loss"], rel=1e-6)
    assert [loss.t.tolist() for loss in losses] == [good["t"], bad["t"]]
    with pytest.raises(ValueError, match="a recipe of seed 3"):
        Trainer(poisoned("loss", seed=4), tmp_path).replay(tmp_path / "nonfinite-step-5.json")
    with pytest.raises(TrainingDiverged, match="after step 5"):
        Trainer(poisoned("loss"), tmp_path).fit()


@pytest.mark.parametrize(
    "number, error, status", [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, None)]
)
def test_a_signal_saves_the_step_in_progress(tmp_path, number, error, status):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    trainer = Trainer(tiny(), tmp_path / "run")
    with pytest.raises(error) as caught:
        trainer.fit(on_step=lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    assert getattr(caught.value, "code", None) == status
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-4"
    assert not (tmp_path / "run" / "run.lock").exists()
    last = Trainer(tiny(), tmp_path / "run")
    last.fit()
    whole = Trainer(tiny(), tmp_path / "whole")
    whole.fit()
    assert_same(state(whole), state(last))


PROGRAM = """
import sys, time, torch
torch.set_num_threads(1)
from tests.tiny import tiny
from untwine.training.trainer import Trainer
def heard(step):
    print(step, flush=True)
    time.sleep(float(sys.argv[2]))
Trainer(tiny(**{"train.num_steps": 500, "train.num_workers": 2}), sys.argv[1]).fit(on_step=heard)
"""


def launch(folder, pause: float) -> subprocess.Popen:
    """A run in a process group of its own, which has finished its first step."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "1\n"
    return process


def test_a_signal_to_the_group_takes_the_workers_and_no_step(tmp_path):
    """As a scheduler ends a job: trainer and data workers hear it at once."""
    process = launch(tmp_path, 0.0)
    os.killpg(process.pid, signal.SIGTERM)
    told = process.communicate(timeout=60)[0].split()
    assert process.returncode == 143
    assert checkpoint.latest(tmp_path / "checkpoints").name == f"step-{(told or ['1'])[-1]}"


def test_a_second_signal_ends_at_once(tmp_path):
    process = launch(tmp_path, 600.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143
    process.stdout.close()
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_a_launcher_that_passes_a_signal_on_is_no_second_one():
    with StopSignals(Distributed(torch.device("cpu"))) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed() == signal.SIGTERM


class Full(Storage):
    """A disk that is full at some of the saves."""

    def __init__(self, *full: int) -> None:
        self.saves, self.full_at = 0, full

    def write_tensors(self, folder, tensors):
        self.saves += 1
        if self.saves in self.full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_tensors(folder, tensors)


def full_run(folder, *full: int) -> Trainer:
    trainer = Trainer(tiny(**{"train.num_steps": 12, "train.save_every": 2}), folder)
    trainer.storage = Full(*full)
    return trainer


def test_a_full_disk_is_survived_loudly(tmp_path, caplog):
    trainer = full_run(tmp_path, 2, 3, 5)
    result = trainer.fit()
    assert result.step == 12
    assert trainer.storage.saves == 6
    errors = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 3
    assert all("No space left" in e and "needed" in e and "tries again in 2 steps" in e for e in errors)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-12", "step-8"]


def test_three_failures_in_a_row_stop_the_run(tmp_path):
    trainer = full_run(tmp_path, 2, 3, 4)
    with pytest.raises(SavingFailed, match=r"3 in a row.*Free \d+ bytes.*continues from step 2"):
        trainer.fit()
    assert trainer.step == 8
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    again = Trainer(trainer.recipe, tmp_path)
    again.fit()
    whole = full_run(tmp_path / "whole")
    whole.fit()
    assert_same(state(whole), state(again))


def test_a_run_that_cannot_be_saved_does_not_pretend_to_be_done(tmp_path):
    with pytest.raises(SavingFailed, match=r"continues from step 10"):
        full_run(tmp_path, 6).fit()


def test_a_full_disk_costs_lines_of_the_log_only(tmp_path, caplog):
    folder = tmp_path / "gone"
    log = RunLog(folder / "log.jsonl", enabled=True)
    assert log.write("train", step=1)["step"] == 1
    assert "is lost" in caplog.text
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"kind": "train", "st')
    log = RunLog(folder / "log.jsonl", enabled=True)
    log.write("train", step=2)
    log.write("train", step=3)
    assert [line["step"] for line in read_log(folder / "log.jsonl")] == [2, 3]


def test_a_fit_of_a_long_run_is_that_of_its_steps():
    """Bins of several steps give nearly the weights of the steps."""
    profiles = [(at, PowerEMA(sigma_rel=s).gamma) for at in range(2_000, 20_001, 2_000) for s in (0.05, 0.10)]
    target = (20_000, PowerEMA(sigma_rel=0.14).gamma)
    tau = torch.arange(1, 20_001, dtype=torch.float64)

    def steps(end: int, gamma: float) -> torch.Tensor:
        return torch.where(tau <= end, (tau / end) ** (gamma + 1) - ((tau - 1) / end) ** (gamma + 1), 0)

    weights, miss = fit(profiles, target)
    made = sum(w * steps(*profile) for w, profile in zip(weights, profiles))
    assert float((made - steps(*target)).norm() / steps(*target).norm()) == pytest.approx(miss, rel=0.02)
    assert sum(weights) == pytest.approx(1, abs=1e-4)


def test_more_snapshots_fit_better():
    gammas = [PowerEMA(sigma_rel=s).gamma for s in (0.05, 0.10)]
    target = (1000, PowerEMA(sigma_rel=0.15).gamma)
    misses = [fit([(at, g) for at in range(1000 // n, 1001, 1000 // n) for g in gammas], target)[1] for n in (1, 4, 20)]
    assert misses[0] > misses[1] > misses[2] < 0.01
    weights, miss = fit([(1000, gammas[0]), (1000, gammas[1])], (1000, gammas[1]))
    assert weights == pytest.approx([0, 1], abs=1e-6)
    assert miss < 1e-6


def test_an_average_of_any_width_after_the_run(tmp_path):
    """Against averages that were tracked: the error relative to how far the two widths are apart."""
    widths = (0.07, 0.10, 0.15, 0.20)
    changes = {
        "train.num_steps": 96,
        "train.ema_snapshots_every": 4,
        "train.save_every": 50,
        "ema": [{"kind": "power", "sigma_rel": s} for s in widths],
    }
    part = Trainer(tiny(**changes), tmp_path)
    part.fit(until=37)
    trainer = Trainer(tiny(**changes), tmp_path)
    trainer.fit()
    tracked = [flat(average.tensors()) for average in trainer.networks.averages]
    for k, width in enumerate(widths):
        found = reconstruct(tmp_path, width)
        assert found.keys() == dict(trainer.networks.model.named_parameters()).keys()
        spread = (tracked[0] - tracked[-1]).norm()
        assert (flat(found) - tracked[k]).norm() / spread < 0.05, width
    narrow, wide = flat(reconstruct(tmp_path, 0.07)), flat(reconstruct(tmp_path, 0.20))
    assert (narrow - tracked[3]).norm() > 10 * (wide - tracked[3]).norm()
    assert trainer.networks.tracked[0].profile == PowerEMA(sigma_rel=0.05)


def test_snapshots_change_nothing_and_refuse_what_they_cannot(tmp_path):
    plain, watched = (
        Trainer(tiny(**{"train.ema_snapshots_every": every}), tmp_path / str(every)) for every in (None, 4)
    )
    plain.fit()
    watched.fit()
    assert_same(state(plain), {k: v for k, v in state(watched).items() if not k.startswith("tracked.")})
    with pytest.raises(ValueError, match="no EMA snapshots"):
        reconstruct(tmp_path / "None", 0.1)
    with pytest.raises(ValueError, match="only to within"):
        reconstruct(tmp_path / "4", 0.25)
    file = tmp_path / "4" / "ema-snapshots" / "step-0000004.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        reconstruct(tmp_path / "4", 0.1)


def flat(tensors) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for _, value in sorted(tensors.items())])
