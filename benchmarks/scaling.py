"""One training run on one process and on several: what is the same, how far the rest differs, and what it costs.

    python benchmarks/scaling.py                # on a machine that does nothing else: some minutes
    python benchmarks/scaling.py --steps 200    # length of the loss curves

Processes are joined by gloo, each with one thread: one process, one that accumulates two micro-batches, two replicas,
two shards, and two replicas of two shards. Compared with one process are the order of the samples, every tensor after
50 steps of plain SGD, the weights after 20 steps of AdamW, and a curve of the loss; likewise a run that moves from two
processes to one and to four. Throughput is that of a wider network; two threads of one process are the same two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import ROOT, save

sys.path.insert(0, str(ROOT))
from tests.distributed import spawn
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny
from torch.distributed.tensor import DTensor

from untwine.plotting import figure
from untwine.training.distributed import Distributed
from untwine.training.metering import read_log
from untwine.training.optim import OPTIMIZERS, OptimizerConfig, OptimizerSet, _trainable
from untwine.training.trainer import Trainer

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "one process, accumulation 2": (1, {"train.accumulation": 2}),
    "2 replicas (DDP)": (2, {"train.parallel": {"strategy": "ddp"}}),
    "2 shards (FSDP2)": (2, {"train.parallel": {"strategy": "fsdp"}}),
    "2 replicas of 2 shards (HSDP)": (4, {"train.parallel": {"strategy": "hsdp", "shard_size": 2}}),
}
SGD = {"optimizer": {"kind": "benchmark_sgd", "lr": 1e-2}, "schedule": {"kind": "constant"}, "train.num_steps": 50}
ADAMW = {"train.num_steps": 20}
WIDE = {
    "model": {"kind": "ddt", "hidden_size": 192, "depth": 8, "encoder_depth": 6, "num_heads": 6, "patch_size": 1},
    "train.batch_size": 32,
    "train.num_steps": 24,
    "train.log_every": 1,
    "train.validation": 0,
}


@dataclass(frozen=True, kw_only=True)
class PlainSGD(OptimizerConfig):
    """Without momentum: rounding is not amplified, so that every tensor can be compared."""

    lr: float

    def build(self, named_params: Any, factors: Any = None) -> OptimizerSet:
        names = _trainable(named_params)
        return OptimizerSet([torch.optim.SGD(list(names), lr=self.lr)], names)


def _register() -> None:
    if "benchmark_sgd" not in OPTIMIZERS:
        OPTIMIZERS.register("benchmark_sgd", "scaling:PlainSGD")


def train(processes: Distributed, changes: dict[str, Any], folder: str, until: int | None = None) -> dict[str, Any]:
    """The weights at the end, whole, the counters of the samples seen here, and the seconds of each step."""
    _register()
    seen, times = [], [time.perf_counter()]
    trainer = Trainer(tiny(**changes), folder, device="cpu")
    condition = trainer.objective.condition

    def spy(model: Any, batch: Any, draws: Any) -> Any:
        if trainer.objective.training:
            seen.append(batch.index.clone())
        return condition(model, batch, draws)

    trainer.objective.condition = spy  # type: ignore[method-assign]
    trainer.fit(until=until, on_step=lambda step: times.append(time.perf_counter()))
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in trainer.networks.tensors().items()
        if name.startswith("model.")
    }
    return {"weights": weights, "seen": seen, "seconds": [b - a for a, b in pairwise(times)]}


def run(processes: int, changes: dict[str, Any], folder: Path, until: int | None = None) -> list[dict[str, Any]]:
    """Of every rank."""
    if processes == 1:
        return [train(Distributed(torch.device("cpu")), changes, str(folder), until)]
    return run_ranks(train, processes, changes, str(folder), until)


def order(ranks: list[dict[str, Any]]) -> torch.Tensor:
    """Counters in the order in which an update takes them: by micro-batch, then by rank."""
    return torch.cat([piece for pieces in zip(*(rank["seen"] for rank in ranks)) for piece in pieces])


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of a number, and the relative distance of all together."""
    a, b = (torch.cat([value.flatten().double() for value in weights.values()]) for weights in (one, other))
    return {"largest": float((a - b).abs().max()), "relative": float((a - b).norm() / a.norm())}


def compare(work: Path, steps: int) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    reference: dict[str, Any] = {}
    for name, (processes, layout) in LAYOUTS.items():
        rows[name] = {"processes": processes}
        for case, changes in (("sgd", SGD), ("adamw", ADAMW)):
            ranks = run(processes, {**changes, **layout}, work / f"{name}-{case}")
            reference.setdefault(case, ranks)
            found = difference(reference[case][0]["weights"], ranks[0]["weights"])
            same = torch.equal(order(reference[case]), order(ranks))
            rows[name][case] = {**found, "order_identical": same}
        curve = {"train.num_steps": steps, "train.log_every": 1, "train.save_every": steps}
        run(processes, {**curve, **layout}, work / f"{name}-curve")
        rows[name]["loss"] = [line["loss"] for line in read_log(work / f"{name}-curve" / "log.jsonl")]
        first = next(iter(rows.values()))["loss"]
        rows[name]["largest_gap"] = max(abs(a - b) for a, b in zip(first, rows[name]["loss"]))
        print(name, {key: value for key, value in rows[name].items() if key != "loss"}, flush=True)
    rows["2 processes, then 1, then 4"] = moved(work / "moved", reference["sgd"])
    return rows


def moved(folder: Path, reference: list[dict[str, Any]]) -> dict[str, Any]:
    """A run that stops twice and goes on in another number of processes."""
    parts = [
        run(2, {**SGD, **LAYOUTS["2 shards (FSDP2)"][1]}, folder, 20),
        run(1, SGD, folder, 35),
        run(4, {**SGD, **LAYOUTS["2 replicas of 2 shards (HSDP)"][1]}, folder),
    ]
    seen = torch.cat([order(ranks) for ranks in parts])
    found = difference(reference[0]["weights"], parts[-1][0]["weights"])
    return {"processes": [2, 1, 4], "sgd": {**found, "order_identical": torch.equal(order(reference), seen)}}


def throughput(work: Path) -> dict[str, dict[str, float]]:
    """Images a second, the median of the steps after the first few."""
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds = run(1, WIDE, work / f"threads-{threads}")[0]["seconds"][4:]
        found[f"one process, {threads} thread{'s' if threads > 1 else ''}"] = statistics.median(seconds)
    torch.set_num_threads(1)
    for name in ("2 replicas (DDP)", "2 shards (FSDP2)"):
        ranks = run(2, {**WIDE, **LAYOUTS[name][1]}, work / f"{name}-wide")
        found[name] = statistics.median(ranks[0]["seconds"][4:])
    return {name: {"seconds": s, "images_per_second": WIDE["train.batch_size"] / s} for name, s in found.items()}


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """The curves over each other, and what is left between them."""
    sheet, (curves, gaps) = figure(2, size=(10, 3.6))
    first = next(iter(rows.values()))["loss"]
    for name, row in rows.items():
        if "loss" in row:
            curves.plot(row["loss"], label=name, linewidth=1)
            gaps.plot([abs(a - b) + 1e-9 for a, b in zip(first, row["loss"])], label=name, linewidth=1)
    curves.set(xlabel="optimizer step", ylabel="training loss")
    gaps.set(xlabel="optimizer step", ylabel="difference to one process", yscale="log")
    curves.legend(fontsize=8)
    for axes in (curves, gaps):
        axes.grid(alpha=0.3)
    sheet.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spawn.TIMEOUT_SECONDS = 600
    _register()
    with tempfile.TemporaryDirectory(prefix="untwine-") as folder:
        rows = compare(Path(folder), options.steps)
        speeds = throughput(Path(folder))
    draw(rows, ROOT / "docs" / "images" / "scaling.png")
    told = {name: {k: v for k, v in row.items() if k != "loss"} for name, row in rows.items()}
    save("scaling", {"steps": options.steps, "layouts": told, "throughput": speeds})


if __name__ == "__main__":
    main()
