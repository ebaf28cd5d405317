"""What two processes send in a step of sharded training is what the plan says."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.spawn import run_ranks
from tests.tiny import tiny
from untwine.training.communication import LINKS, Links, communication
from untwine.training.distributed import Distributed
from untwine.training.planning import plan
from untwine.training.trainer import Trainer


class Counting(TorchDispatchMode):
    """Bytes of the gathered and of the reduced tensors that pass through collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_allgather_base_":
            self.gathered += args[0].nbytes
        elif name == "_reduce_scatter_base_":
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


def recipe(**changes):
    wide = {"kind": "ddt", "hidden_size": 64, "depth": 6, "encoder_depth": 4, "num_heads": 2}
    told = {
        "model": wide,
        "model.in_channels": 1,
        "model.num_classes": 10,
        "train.accumulation": 2,
        "train.num_steps": 2,
    }
    return tiny(**told, **changes)


def counted(processes: Distributed, folder: str, changes: dict) -> tuple[int, int]:
    """What the second step of a run moves."""
    trainer, modes = Trainer(recipe(**changes), folder, device="cpu"), []
    update = trainer._update

    def spy(micro_batches):
        with Counting() as mode:
            update(micro_batches)
        modes.append(mode)

    trainer._update = spy
    trainer.fit()
    return modes[1].gathered, modes[1].reduced


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_sends_what_the_plan_says(tmp_path, dtype):
    changes = {"train.parallel": {"strategy": "fsdp", "param_dtype": dtype}}
    gathered, reduced = run_ranks(counted, 2, str(tmp_path), changes)[0]
    expected = plan(recipe(**changes), (1, 8, 8), count=2).communication
    assert expected is not None
    assert (expected.strategy, expected.copies, expected.shards) == ("fsdp", 1, 2)
    # Encode, decode and forward each gather what lies outside the blocks: little of a real model, much of this one.
    model = recipe(**changes).model.build()
    outside = 1 - sum(p.numel() for p in model.blocks.parameters()) / sum(p.numel() for p in model.parameters())
    assert 1 <= gathered / 2 / expected.gathered < 1 + 5 * outside
    assert 1 <= reduced / 2 / expected.reduced < 1 + outside


def test_volumes_and_times():
    """By hand: 10^9 weights on 64 devices of 8 a machine."""
    replicas = communication("ddp", 10**9, count=64, shards=1, links=LINKS["h100"])
    assert (replicas.gathered, replicas.reduced) == (0, round(2 * 63 / 64 * 4e9))
    assert replicas.seconds == pytest.approx(2 * 63 / 64 * 4 / 50)
    whole = communication("fsdp", 10**9, count=64, shards=64, accumulation=2, bytes_per_weight=2)
    assert (whole.gathered, whole.reduced) == (round(63 / 64 * 8e9), round(63 / 64 * 4e9))
    assert whole.seconds is None
    assert whole.scaling(1.0) is None
    both = communication("hsdp", 10**9, count=64, shards=8, bytes_per_weight=2, links=LINKS["h100"])
    assert both.seconds == pytest.approx(7 / 8 * 8 / 450 + 2 * 7 / 8 * 4 / 8 / 50)
    assert both.scaling(both.seconds) == pytest.approx((0.5, 1.0))
    alone = communication("ddp", 10**6, count=8, shards=1, links=LINKS["h100"])
    assert alone.seconds == pytest.approx(2 * 7 / 8 * 4e6 / 450e9)


@pytest.mark.parametrize("speeds", [(0, 50), (450, 0), (-1, 50), (float("nan"), 1)])
def test_impossible_links(speeds):
    with pytest.raises(ValueError, match="links must be two speeds > 0 in GB/s"):
        Links(*speeds)


def test_one_device_sends_nothing():
    assert plan(recipe(), (1, 8, 8)).communication is None
