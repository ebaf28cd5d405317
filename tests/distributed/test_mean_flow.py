"""MeanFlow on two processes is MeanFlow on one: the forward-mode derivative goes through replicas and shards."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.distributed.test_trainer import _distance, train
from untwine.training.distributed import Distributed
from untwine.training.metering import read_log

STRATEGIES = ("ddp", "fsdp")
MODELS = {
    "lightningdit": {},
    "ddt_head": {"encoder_depth": 1, "decoder_hidden_size": 48, "decoder_num_heads": 2},
}


def _changes(kind: str, strategy: str = "auto") -> dict:
    """Every step has a derivative, and a guided target; one optimizer step after another, clipped."""
    shape = {
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "num_time_tokens": 2,
        "num_label_tokens": 2,
    }
    return {
        "model": {"kind": kind, **shape, "conditioning": "tokens", "second_time": True, **MODELS[kind]},
        "objective": {"kind": "mean_flow", "flow_ratio": 0.0, "omega": 1.5, "kappa": 0.2},
        "train.num_steps": 3,
        "train.log_every": 1,
        "train.clip_norm": 1.0,
        "train.parallel": {"strategy": strategy},
    }


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("kind", MODELS)
def test_two_processes_equal_one(kind, tmp_path):
    single = train(Distributed(torch.device("cpu")), _changes(kind), str(tmp_path / "alone"))
    losses = [line["loss"] for line in read_log(tmp_path / "alone" / "log.jsonl", "train")]
    assert len(losses) == 3
    for strategy in STRATEGIES:
        ranks = run_ranks(train, 2, _changes(kind, strategy), str(tmp_path / strategy))
        for prefix in ("model.", "ema.0."):
            assert _distance(single, ranks[0], prefix) <= 1e-5, (strategy, prefix)
        theirs = [line["loss"] for line in read_log(tmp_path / strategy / "log.jsonl", "train")]
        assert theirs == pytest.approx(losses, rel=1e-5), strategy
