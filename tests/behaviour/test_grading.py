"""Evaluation during training."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny
from untwine.evaluation.evaluator import Evaluator
from untwine.evaluation.protocols import find_protocol
from untwine.pipelines.loading import load
from untwine.training.metering import read_log
from untwine.training.trainer import Trainer

SAMPLING = {"num_inference_steps": 3, "guidance_scale": 1.0}
EVALUATION = {"protocol": "kid-efflite0-500", "num_samples": 30, "batch_size": 16}


def test_log_holds_what_evaluating_the_averaged_weights_gives(tmp_path):
    changes = {"train.evaluate_every": 4, "train.evaluation": EVALUATION, "sampling": SAMPLING, "train.num_steps": 4}
    trainer = Trainer(tiny(**changes), tmp_path / "run")
    trainer.fit()
    (line,) = read_log(tmp_path / "run" / "log.jsonl", "evaluation")
    assert (line["step"], line["weights"]) == (4, "ema:0")
    assert line["protocol"]["num_samples"] == 30
    assert "num_samples" in line["protocol"]["modified"]
    images = load(str(tmp_path / "run"))(num_images=30, seed=trainer.recipe.seed, output_type="pt").images
    evaluator = Evaluator(trainer.dataset, find_protocol("kid-efflite0-500", num_samples=30))
    evaluator.update((images * 255).round().to(torch.uint8))
    assert line["kid"] == pytest.approx(evaluator.result().metrics["kid"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.evaluate_every": 0}, "evaluate_every must be >= 1, or null"),
        ({"train.evaluation": {"protocol": "fid"}}, "protocol: unknown 'fid'"),
        ({"train.evaluation": {"batch_size": 0}}, "batch_size must be >= 1, got 0"),
    ],
)
def test_impossible_options(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
