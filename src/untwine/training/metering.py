"""Numbers of a run: summed on the device, read once per log line, written as JSON lines."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from untwine.contracts import Loss
from untwine.training.distributed import Distributed

logger = logging.getLogger(__name__)
NUM_BINS = 10
"""time bins of equal width on [0, 1]"""


class LossMeter:
    """Means of the loss, its parts and the loss per time bin, over micro-batches and processes."""

    def __init__(self, processes: Distributed) -> None:
        self.processes = processes
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, loss: Loss, prefix: str = "", weight: float = 1.0) -> None:
        """Adds one micro-batch, which counts ``weight`` times; nothing is read from the device."""
        for name, value in {"loss": loss.total, **loss.parts}.items():
            self.add_value(prefix + name, value, weight)
        if loss.per_sample is not None and loss.t is not None:
            bins = (loss.t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
            table = torch.zeros(2, NUM_BINS, device=bins.device)
            table[0].index_add_(0, bins, loss.per_sample.float())
            table[1].index_add_(0, bins, torch.ones_like(loss.per_sample, dtype=torch.float32))
            self._add(f"{prefix}loss_per_time_bin", table * (weight > 0))

    def add_value(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Adds one scalar."""
        value = value.detach().float()
        self._add(name, torch.stack([value, torch.ones_like(value)]) * weight)

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
        self._torn = enabled and path.exists() and not path.read_bytes().endswith(b"\n")

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        """Appends a line; ``seconds`` counts from the start of this process. A full disk costs the line only."""
        line = {"kind": kind, **values, "seconds": round(time.perf_counter() - self.started, 3)}
        if self.enabled:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n" * self._torn + json.dumps(line) + "\n")
                self._torn = False
            except OSError as error:
                logger.error("a line of %s is lost: %s", self.path, error)
                self._torn = True
        return line


def read_log(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; after a resume, lines of repeated steps are superseded by the later ones."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # a line that an interruption or a full disk has torn
            line = json.loads(text)
            latest[line["kind"], line.get("step", -1)] = line
    found = sorted(latest.values(), key=lambda line: line.get("step", -1))
    return [line for line in found if kind in (None, line["kind"])]
