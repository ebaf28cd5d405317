"""The same recipe on one process, on two with replicas and on two with shards is the same training run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from tests.distributed.spawn import run_ranks
from tests.faults.poison import register
from tests.tiny import tiny
from untwine.training import checkpoint
from untwine.training.distributed import Distributed
from untwine.training.metering import read_log
from untwine.training.nonfinite import TrainingDiverged
from untwine.training.posthoc import reconstruct
from untwine.training.trainer import Trainer

STEPS = 20
STRATEGIES = ["ddp", "fsdp"]
PROJECTOR = {"kind": "flow_matching", "terms": [{"kind": "test_projector"}]}


def _full(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def train(processes: Distributed, changes: dict, folder: str, until: int | None = None) -> dict[str, torch.Tensor]:
    """The whole state after training, gathered, and what this rank drew."""
    seen = []
    trainer = Trainer(tiny(**changes), folder, device="cpu")
    condition = trainer.objective.condition

    def spy(model, batch, draws):
        if trainer.objective.training:
            seen.append(batch.index.clone())
        return condition(model, batch, draws)

    trainer.objective.condition = spy
    trainer.fit(until=until)
    return {**{name: _full(value) for name, value in trainer.networks.tensors().items()}, "seen": torch.cat(seen)}


def _changes(strategy: str = "auto", **more) -> dict:
    return {
        "train.num_steps": STEPS,
        "train.save_every": 7,
        "train.log_every": 5,
        "train.accumulation": 2,
        "train.clip_norm": 1.0,
        "objective": PROJECTOR,
        "train.parallel": {"strategy": strategy},
        **more,
    }


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], prefix: str) -> float:
    a, b = (torch.cat([v.flatten() for k, v in state.items() if k.startswith(prefix)]) for state in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return train(Distributed(torch.device("cpu")), _changes(), str(folder)), read_log(folder / "log.jsonl")


def train_twice(processes: Distributed, changes: dict, folder: str) -> dict[str, torch.Tensor]:
    """To step 9 with saves in the background, and from the one of step 6 on after the newest was lost."""
    train(processes, changes, folder, until=9)
    if processes.is_main:
        shutil.rmtree(Path(folder) / "checkpoints" / "step-9")
    processes.barrier()
    return train(processes, changes, folder)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saves_in_the_background_are_of_their_step(alone, tmp_path, strategy):
    changes = _changes(strategy, **{"train.async_save": True, "train.save_every": 3})
    for state in run_ranks(train_twice, 2, changes, str(tmp_path)):
        assert len(state["seen"]) == (STEPS - 6) * 8
        assert _distance(alone[0], state, "model.") < 1e-5


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(alone, tmp_path, strategy):
    single, log = alone
    ranks = run_ranks(train, 2, _changes(strategy), str(tmp_path))
    for prefix in ("model.", "objective.", "ema.0.", "ema.1."):
        assert _distance(single, ranks[0], prefix) <= 1e-5, prefix
    # Each micro-batch of one process is the two ranks' pieces in order: draws and order are identical.
    pieces = torch.stack([rank["seen"].view(STEPS * 2, -1) for rank in ranks], 1)
    assert torch.equal(pieces.flatten(), single["seen"])
    theirs = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in theirs] == [line["step"] for line in log]
    for ours, other in zip(log, theirs):
        assert other["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert other.get("grad_norm", 0) == pytest.approx(ours.get("grad_norm", 0), rel=1e-3)
        assert other.get("lr") == ours.get("lr")


@pytest.mark.xdist_group("distributed")
def test_replicas_of_shards_equal_one(alone, tmp_path):
    plan = {"strategy": "hsdp", "shard_size": 2}
    ranks = run_ranks(train, 4, _changes(**{"train.parallel": plan}), str(tmp_path))
    for prefix in ("model.", "objective.", "ema.0."):
        assert _distance(alone[0], ranks[0], prefix) <= 1e-5, prefix
    pieces = torch.stack([rank["seen"].view(STEPS * 2, -1) for rank in ranks], 1)
    assert torch.equal(pieces.flatten(), alone[0]["seen"])


@pytest.mark.xdist_group("distributed")
def test_resume_on_another_number_of_processes(alone, tmp_path):
    """Seven steps on one process, the next seven on two sharded ones, the rest on one."""
    single, _ = alone
    train(Distributed(torch.device("cpu")), _changes(), str(tmp_path), until=7)
    run_ranks(train, 2, _changes("fsdp"), str(tmp_path), 14)
    last = train(Distributed(torch.device("cpu")), _changes(), str(tmp_path))
    assert last["seen"].numel() == 6 * 16
    assert torch.equal(last["seen"], single["seen"][-6 * 16 :])
    for prefix in ("model.", "ema.0."):
        assert _distance(single, last, prefix) <= 1e-5


@pytest.mark.xdist_group("distributed")
def test_sharded_resume_is_bitwise(tmp_path):
    whole = run_ranks(train, 2, _changes("fsdp", **{"train.num_steps": 6}), str(tmp_path / "whole"))
    run_ranks(train, 2, _changes("fsdp", **{"train.num_steps": 6}), str(tmp_path / "parts"), 4)
    parts = run_ranks(train, 2, _changes("fsdp", **{"train.num_steps": 6}), str(tmp_path / "parts"))
    different = [k for k in whole[0] if k != "seen" and not torch.equal(whole[0][k], parts[0][k])]
    assert not different


@pytest.mark.xdist_group("distributed")
def test_bf16_and_checkpointing_under_shards(tmp_path):
    plan = {"strategy": "fsdp", "param_dtype": "bfloat16", "checkpointing": True}
    ranks = run_ranks(train, 2, _changes(**{"train.num_steps": 3, "train.parallel": plan}), str(tmp_path))
    assert all(value.isfinite().all() for value in ranks[0].values())
    assert ranks[0]["model.blocks.0.mlp.w1.weight"].dtype == torch.float32


WATCHED = {
    "train.num_steps": 4,
    "train.validation": 57,  # 513 triples: one process has a batch more to measure than the other
    "train.validate_every": 2,
    "train.sample_every": 2,
    "train.ema_snapshots_every": 2,
    "train.batch_size": 8,
    "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0, "refresh_every": 2},
}


def watch(processes: Distributed, strategy: str, folder: str) -> dict[str, float]:
    trainer = Trainer(tiny(**WATCHED, **{"train.parallel": {"strategy": strategy}}), folder, device="cpu")
    return trainer.fit().metrics


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_watching_two_processes(tmp_path, strategy):
    """Validation, samples and snapshots are those of one process."""
    alone = watch(Distributed(torch.device("cpu")), "auto", str(tmp_path / "alone"))
    ranks = run_ranks(watch, 2, strategy, str(tmp_path / "two"))
    assert ranks[0]["validation_loss"] == ranks[1]["validation_loss"]
    assert ranks[0]["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-5)
    for step in (2, 4):
        one, two = (
            np.asarray(Image.open(tmp_path / f / "samples" / f"step-{step}.png"), int) for f in ("alone", "two")
        )
        assert np.abs(one - two).max() <= 1
        assert one.std() > 10
    one, two = (reconstruct(tmp_path / f, 0.07) for f in ("alone", "two"))
    assert _distance(one, two, "") <= 1e-3  # they are stored in half precision


def diverge(processes: Distributed, strategy: str, folder: str) -> tuple[str, dict, dict]:
    """The message, and the state before and after."""
    register()
    objective = {"kind": "test_poisoned", "counter": 3 * 16 + 13}  # of the second rank
    recipe = tiny(objective=objective, **{"train.parallel": {"strategy": strategy}})
    states = []

    def look(step: int) -> None:
        states.append({name: _full(value) for name, value in trainer.networks.tensors().items()})

    trainer = Trainer(recipe, folder, device="cpu")
    with pytest.raises(TrainingDiverged) as caught:
        trainer.fit(on_step=look)
    look(-1)
    return str(caught.value), states[-2], states[-1]


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_nan_on_one_rank_stops_all_before_the_update(tmp_path, strategy):
    for message, before, after in run_ranks(diverge, 2, strategy, str(tmp_path)):
        assert "after step 3" in message
        assert not [name for name in before if not torch.equal(before[name], after[name])]
    dump = json.loads((tmp_path / "nonfinite-step-3.json").read_text())
    assert [(piece["rank"], piece["nonfinite"]) for piece in dump["micro_batches"]] == [(0, []), (1, [61])]
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-3"
    register()
    recipe = tiny(objective={"kind": "test_poisoned", "counter": 61})
    losses = Trainer(recipe, tmp_path).replay(tmp_path / "nonfinite-step-3.json")
    assert [bool(loss.total.isfinite()) for loss in losses] == [True, False]


def stop(processes: Distributed, number: int, folder: str) -> tuple[str, int]:
    def send(step: int) -> None:
        if step == 2 and processes.rank == 1:
            os.kill(os.getpid(), number)

    trainer = Trainer(tiny(**{"train.parallel": {"strategy": "fsdp"}}), folder, device="cpu")
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        trainer.fit(on_step=send)
    return str(getattr(caught.value, "code", "interrupted")), trainer.step


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, "143"), (signal.SIGINT, "interrupted")])
def test_a_signal_to_one_rank_is_the_decision_of_all(tmp_path: Path, number, status):
    assert run_ranks(stop, 2, number, str(tmp_path)) == [(status, 2), (status, 2)]
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-2"
