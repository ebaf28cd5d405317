"""``untwine plan`` against real training steps on this CPU: memory and time, and by how much the plan is wrong.

    python benchmarks/plan_check.py

Each shape runs in a process of its own. Measured memory is the peak of the process beyond what it held before the model
was built, with an allocator that gives large blocks back at once; time is taken without that. The efficiency is that of
the first shape, and predicts the time of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from common import save

from untwine.contracts import Condition
from untwine.training.distributed import Distributed
from untwine.training.networks import Networks
from untwine.training.planning import plan
from untwine.training.recipe import Recipe
from untwine.training.speed import TRAINING, gemm_peak

LATENT = (4, 32, 32)
SHAPES = (
    {"hidden_size": 256, "depth": 8, "encoder_depth": 6, "num_heads": 4, "batch": 16},
    {"hidden_size": 256, "depth": 8, "encoder_depth": 6, "num_heads": 4, "batch": 32},
    {"hidden_size": 384, "depth": 12, "encoder_depth": 8, "num_heads": 6, "batch": 8},
    {"hidden_size": 128, "depth": 12, "encoder_depth": 10, "num_heads": 4, "batch": 32},
)


def recipe(shape: dict[str, int]) -> Recipe:
    model = {key: value for key, value in shape.items() if key != "batch"}
    return Recipe.from_dict(
        {
            "name": "plan-check",
            "data": {"kind": "digits"},
            "model": {"kind": "ddt", **model, "patch_size": 2, "in_channels": LATENT[0], "num_classes": 10},
            "train": {"num_steps": 1, "batch_size": shape["batch"]},
        }
    )


def measure(shape: dict[str, int], steps: int) -> dict[str, float]:
    """Peak bytes beyond the start, and seconds a step, of forward, backward, AdamW and average."""
    batch = shape["batch"]
    x, t = torch.randn(batch, *LATENT), torch.rand(batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = recipe(shape)
    networks = Networks(told, told.objective.build(), told.model.build, Distributed(torch.device("cpu")))
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        networks.zero_grad()
        prediction = networks.model(x, t, Condition(labels=torch.arange(batch) % 10)).sample
        (prediction - x).square().mean().backward()
        networks.update("model", step)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"bytes": peak * 1024, "seconds": statistics.median(seconds[1:])}


def in_process(shape: int, steps: int, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--shape", str(shape), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shape", type=int, help="measure this one and print it: what the processes run")
    options = parser.parse_args()
    if options.shape is not None:
        print(json.dumps(measure(SHAPES[options.shape], options.steps)))
        return
    rows: list[dict[str, Any]] = []
    peak, efficiency = gemm_peak(torch.device("cpu")), None
    for i, shape in enumerate(SHAPES):
        found = {"bytes": in_process(i, 2, MALLOC_MMAP_THRESHOLD_="65536")["bytes"]}
        found["seconds"] = in_process(i, options.steps)["seconds"]
        told = recipe(shape)
        planned = plan(told, LATENT, efficiency=1.0)
        work = planned.step_flops
        assert work == TRAINING * told.model.build().flops(LATENT) * shape["batch"]
        if efficiency is None:
            efficiency = work / peak / found["seconds"]
        seconds = work / peak / efficiency
        rows.append(
            {
                "shape": shape,
                "planned_mib": round(planned.memory / 2**20, 1),
                "measured_mib": round(found["bytes"] / 2**20, 1),
                "memory_error": round(planned.memory / found["bytes"] - 1, 3),
                "planned_seconds": round(seconds, 3),
                "measured_seconds": round(found["seconds"], 3),
                "time_error": round(seconds / found["seconds"] - 1, 3),
            }
        )
    save("plan_check", {"gemm_peak_gflops": round(peak / 1e9, 1), "efficiency": efficiency, "rows": rows})


if __name__ == "__main__":
    main()
