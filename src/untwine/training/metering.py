"""Numbers of a run: summed on the device, read once per log line, written as JSON lines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from untwine.contracts import Loss
from untwine.training.distributed import Distributed

NUM_BINS = 10
"""time bins of equal width on [0, 1]"""


class LossMeter:
    """Means of the loss, its parts and the loss per time bin, over micro-batches and processes."""

    def __init__(self, processes: Distributed) -> None:
        self.processes = processes
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, loss: Loss, prefix: str = "") -> None:
        """Adds one micro-batch; nothing is read from the device."""
        for name, value in {"loss": loss.total, **loss.parts}.items():
            self._add(prefix + name, torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)]))
        if loss.per_sample is not None and loss.t is not None:
            bins = (loss.t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
            table = torch.zeros(2, NUM_BINS, device=bins.device)
            table[0].index_add_(0, bins, loss.per_sample.float())
            table[1].index_add_(0, bins, torch.ones_like(loss.per_sample, dtype=torch.float32))
            self._add(f"{prefix}loss_per_time_bin", table)

    def add_value(self, name: str, value: Tensor) -> None:
        """Adds one scalar that is the same on every process."""
        self._add(name, torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)]))

    def _add(self, name: str, pair: Tensor) -> None:
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self) -> dict[str, Any]:
        """Means over everything added since the last reading, in one exchange; None for bins without data."""
        if not self._sums:
            return {}
        flat = self.processes.all_reduce_mean(torch.cat([pair.reshape(-1) for pair in self._sums.values()])).cpu()
        found: dict[str, Any] = {}
        for name, pair in self._sums.items():
            total, count = flat[: pair.numel()].view(2, -1)
            flat = flat[pair.numel() :]
            means = [float(a / n) if n > 0 else None for a, n in zip(total, count)]
            found[name] = means if pair.ndim == 2 else means[0]
        self._sums.clear()
        return found


class RunLog:
    """``log.jsonl``: one JSON object a line, appended and flushed; only the main process writes."""

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        self.started = time.perf_counter()

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        """Appends a line; ``seconds`` counts from the start of this process."""
        line = {"kind": kind, **values, "seconds": round(time.perf_counter() - self.started, 3)}
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line


def read_log(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; after a resume, lines of repeated steps are superseded by the later ones."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        latest[line["kind"], line.get("step", -1)] = line
    found = sorted(latest.values(), key=lambda line: line.get("step", -1))
    return [line for line in found if kind in (None, line["kind"])]
