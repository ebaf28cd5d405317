"""Evaluation of a model in training: a protocol's metrics of its averaged weights, against the training data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.evaluation.evaluator import Evaluator
from untwine.evaluation.protocols import DEFAULT, find_protocol
from untwine.training.preview import Drawing


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the samples of a run are judged; ``train.evaluate_every`` says when."""

    protocol: str = DEFAULT
    num_samples: int | None = None
    """another number than the protocol's; its results then say so"""
    batch_size: int = 64
    """images drawn at once"""
    cache: Path | None = None
    """folder that keeps the features of the training data for other runs"""

    def __post_init__(self) -> None:
        find_protocol(self.protocol, num_samples=self.num_samples)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")


class Grading:
    """Draws as many images as the protocol asks for, always of the same noise and classes or prompts, and judges them.

    Raises:
        ValueError: where the data are not pictures, and for a protocol whose encoder cannot be had.
    """

    def __init__(self, config: EvaluationConfig, drawing: Drawing) -> None:
        protocol = find_protocol(config.protocol, num_samples=config.num_samples)
        if drawing.codec.sample_shape(drawing.codec.latent_shape(drawing.dataset.sample_shape))[0] not in (1, 3):
            raise ValueError("train.evaluate_every needs data that are pictures to compare with; leave it out")
        self.config, self.drawing = config, drawing
        self.evaluator = Evaluator(
            drawing.dataset, protocol, device=drawing.processes.device, batch_size=config.batch_size, cache=config.cache
        )

    def measure(self, model: Any, precision: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
        """Metrics, floor and counts; collective."""
        self.evaluator.reset()
        for index in self.drawing.share(self.evaluator.protocol.num_samples).split(self.config.batch_size):
            self.evaluator.update(self.drawing.draw(model, index, precision), index)
        values = self.evaluator.result().values
        self.evaluator.reset()
        protocol = {name: values["protocol"][name] for name in ("name", "version", "num_samples", "modified")}
        floor = {f"floor_{name}": value for name, value in (values["floor"] or {}).items()}
        return {**values["metrics"], **floor, "protocol": protocol}
