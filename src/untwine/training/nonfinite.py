"""The guard before each update, and what it leaves behind: enough to make a loss that is not finite happen again.

The answer is needed before the optimizer may be told to step, so the guard waits for the device once a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from untwine.contracts import Batch, Loss
from untwine.training.distributed import on_main, together


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer finite; parameters and averages are those of the step before."""


def is_nonfinite(losses: Sequence[Loss], norm: Tensor) -> Tensor:
    """Whether a loss of this process or the gradient norm is NaN or infinite: a bool scalar on the device."""
    return ~torch.stack([norm.float(), *(loss.total.detach().float() for loss in losses)]).isfinite().all()


def write_dump(
    path: Path, about: dict[str, Any], batches: Sequence[Batch], losses: Sequence[Loss], norm: Tensor
) -> dict[str, Any]:
    """Writes the sample counters, times and losses of every micro-batch of every process to ``path``; collective.

    ``micro_batches`` are in the order of their samples: by micro-batch, then by rank.

    Args:
        about: JSON values that go first.
    """
    here = [_describe(batch, loss) for batch, loss in zip(batches, losses)]
    ranks = together(lambda: here)
    pieces = [{"rank": rank, **piece} for pieces in zip(*ranks) for rank, piece in enumerate(pieces)]
    record = {**about, "grad_norm": _number(float(norm)), "micro_batches": pieces}
    on_main(lambda: path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    return record


def _describe(batch: Batch, loss: Loss) -> dict[str, Any]:
    per_sample = [] if loss.per_sample is None else loss.per_sample.tolist()
    return {
        "loss": _number(float(loss.total.detach())),
        "index": batch.index.tolist(),
        "t": None if loss.t is None else loss.t.tolist(),
        "nonfinite": [int(i) for i, value in zip(batch.index, per_sample) if not math.isfinite(value)],
    }


def _number(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
