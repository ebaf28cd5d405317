"""Objectives that do more than call the model are on two processes what they are on one.

MeanFlow takes the forward-mode derivative through replicas and shards; SRA has a second network, the average.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.distributed.test_trainer import _distance, train
from untwine.training.distributed import Distributed
from untwine.training.metering import read_log

STRATEGIES = ("ddp", "fsdp")
TOKENS = {
    "conditioning": "tokens",
    "num_time_tokens": 2,
    "num_label_tokens": 2,
    "second_time": True,
}
HEAD = {"encoder_depth": 1, "decoder_hidden_size": 48, "decoder_num_heads": 2}
MEAN_FLOW = {"kind": "mean_flow", "flow_ratio": 0.0, "omega": 1.5, "kappa": 0.2}
TAUGHT = {"kind": "sra", "site": "blocks.0", "teacher_site": "blocks.1"}
CASES = {
    "mean_flow, lightningdit": ({"kind": "lightningdit", **TOKENS}, MEAN_FLOW),
    "mean_flow, ddt_head": ({"kind": "ddt_head", **TOKENS, **HEAD}, MEAN_FLOW),
    "sra, sit": ({"kind": "sit"}, {"kind": "flow_matching", "terms": [TAUGHT]}),
    "sra, ddt": ({"kind": "ddt", "encoder_depth": 2, "depth": 3}, {"kind": "dual_time", "terms": [TAUGHT]}),
}


def _changes(case: str, strategy: str = "auto") -> dict:
    """One optimizer step after another, clipped."""
    model, objective = CASES[case]
    return {
        "model": {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, **model},
        "objective": objective,
        "ema": [{"kind": "constant", "decay": 0.5}],
        "train.num_steps": 3,
        "train.log_every": 1,
        "train.clip_norm": 1.0,
        "train.parallel": {"strategy": strategy},
    }


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, tmp_path):
    single = train(Distributed(torch.device("cpu")), _changes(case), str(tmp_path / "alone"))
    losses = [line["loss"] for line in read_log(tmp_path / "alone" / "log.jsonl", "train")]
    assert len(losses) == 3
    for strategy in STRATEGIES:
        ranks = run_ranks(train, 2, _changes(case, strategy), str(tmp_path / strategy))
        for prefix in ("model.", "objective.", "ema.0.")[:: 1 if "sra" in case else 2]:
            assert _distance(single, ranks[0], prefix) <= 1e-5, (strategy, prefix)
        theirs = [line["loss"] for line in read_log(tmp_path / strategy / "log.jsonl", "train")]
        assert theirs == pytest.approx(losses, rel=1e-5), strategy
