"""How fast DDT runs: forward, training step, sampling, compilation, optimizer. Every variant shares weights and inputs
and is timed in turn in one process.

    python benchmarks/speed.py forward            batch 2 and 8, float32 and bfloat16, eager and compiled
    python benchmarks/speed.py training           forward, backward, AdamW, EMA
    python benchmarks/speed.py sampling           50 guided steps, encoder refreshed every 1, 2, 3, 5, 8 steps
    python benchmarks/speed.py compile            seconds until the first compiled output
    python benchmarks/speed.py optimizer          AdamW and EMA alone

The reference is a plain eager network of our own (baseline.py), or with ``--peer PATH`` a checkout of the official DDT.
A ratio is the median over repetitions of reference seconds / seconds within one repetition. FLOPs are those of the
formulas (multiply and add are two; a training step is three forwards), the peak is a large matrix product in the same
run. On a GPU: ``--device cuda --shape XL``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baseline import PlainDDT, official_ddt, plain_sampler
from common import save
from torch import Tensor, nn

from untwine.contracts import Condition
from untwine.diffusion.guidance import Branch, Guided, Interval, classifier_free
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import integrate
from untwine.diffusion.solvers import Euler
from untwine.diffusion.timesteps import TimeGrid
from untwine.models.ddt import DDT
from untwine.models.layers.compile import compile_blocks, decompile_blocks
from untwine.training.ema import EMA, ConstantEMA, PowerEMA
from untwine.training.speed import gemm_peak, peak_memory_mib, synchronize

SHAPES = {
    "S": {"hidden_size": 384, "num_groups": 6, "num_blocks": 12, "num_encoder_blocks": 8},
    "B": {"hidden_size": 768, "num_groups": 12, "num_blocks": 12, "num_encoder_blocks": 8},
    "XL": {"hidden_size": 1152, "num_groups": 16, "num_blocks": 28, "num_encoder_blocks": 22},
}
LATENT = (4, 32, 32)


class Bench:
    """The reference network and ours, with equal random weights."""

    def __init__(self, options: argparse.Namespace, shape: str) -> None:
        self.device = torch.device(options.device)
        network, self.reference_sampler = official_ddt(options.peer) if options.peer else (PlainDDT, plain_sampler)
        config = {"in_channels": LATENT[0], "patch_size": 2, "num_classes": 1000, **SHAPES[shape]}
        torch.manual_seed(0)
        self.reference: Any = network(**config).to(self.device)
        with torch.no_grad():
            for p in self.reference.parameters():
                p.add_(0.02 * torch.randn_like(p))
        self.ours = DDT.from_official(self.reference.state_dict(), config).to(self.device)
        self.options = options
        self.flops = self.ours.flops(LATENT)

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(batch, *LATENT)
        return x.to(self.device), torch.rand(batch).to(self.device), (torch.arange(batch) * 37 % 1000).to(self.device)

    def autocast(self, enabled: bool) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def timed(
        self, runs: dict[str, Callable[[], Any]], reference: str, flops: float, warmup: int = 2
    ) -> dict[str, Any]:
        """Rows of a table: seconds, rate, share of the peak of the same run, ratio to the reference."""
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(-warmup, self.options.repeats):
            for name, run in runs.items():
                synchronize(self.device)
                started = time.perf_counter()
                run()
                synchronize(self.device)
                if repeat >= 0:
                    seconds[name].append(time.perf_counter() - started)
        peaks = {dtype: gemm_peak(self.device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
        rows = {}
        for name, taken in seconds.items():
            ratios = [a / b for a, b in zip(seconds[reference], taken)]
            rate = flops / statistics.median(taken)
            rows[name] = {
                "milliseconds": round(1000 * statistics.median(taken), 1),
                "spread": [round(1000 * min(taken), 1), round(1000 * max(taken), 1)],
                "gflops": round(rate / 1e9, 1),
                "peak_share": round(rate / peaks["bfloat16" if "bf16" in name else "float32"], 3),
                "speed_up": round(statistics.median(ratios), 3),
                "speed_up_spread": [round(min(ratios), 3), round(max(ratios), 3)],
            }
        gemm = {name: round(value / 1e9, 1) for name, value in peaks.items()}
        return {
            "reference": reference,
            "gemm_peak_gflops": gemm,
            "rows": rows,
            "memory_mib": peak_memory_mib(self.device),
        }


def _difference(value: Tensor, reference: Tensor) -> float:
    return float((value.float() - reference.float()).abs().max() / reference.float().abs().max())


def _copy(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def _fresh(model: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Any:
    model = _copy(model).to(dtype)
    if compiled:
        compile_blocks(model)
    return model


Inputs = tuple[Tensor, Tensor, Tensor]
"""x (B, C, H, W), t (B,) and labels (B,)"""


def predict_ours(model: Any, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    x, t, y = inputs
    return model(x.to(dtype), t, Condition(labels=y)).sample


def predict_reference(model: Any, inputs: Inputs) -> Tensor:
    x, t, y = inputs
    return -model(x, 1 - t, y)[0]


@torch.no_grad()
def forward(options: argparse.Namespace) -> dict[str, Any]:
    bench, found = Bench(options, options.shape or "B"), {}
    reference, ours = bench.reference.eval(), bench.ours.eval()
    half = _fresh(ours, torch.bfloat16)
    compiled, compiled_half = _fresh(ours, compiled=True), _fresh(ours, torch.bfloat16, compiled=True)

    def autocast(inputs: Inputs) -> Tensor:
        with bench.autocast(True):
            return predict_reference(reference, inputs)

    for batch in options.batches or (2, 8):
        inputs = bench.inputs(batch)
        runs = {
            "reference fp32": partial(predict_reference, reference, inputs),
            "reference bf16 autocast": partial(autocast, inputs),
            "untwine fp32": partial(predict_ours, ours, inputs),
            "untwine fp32 compiled": partial(predict_ours, compiled, inputs),
            "untwine bf16": partial(predict_ours, half, inputs, torch.bfloat16),
            "untwine bf16 compiled": partial(predict_ours, compiled_half, inputs, torch.bfloat16),
        }
        outputs = {name: once() for name, once in runs.items()}
        table = bench.timed(runs, "reference fp32", batch * bench.flops)
        for name, row in table["rows"].items():
            row["max_difference_relative"] = _difference(outputs[name], outputs["reference fp32"])
        found[f"batch {batch}"] = table
    return found


def training_step(bench: Bench, inputs: Inputs, model: Any, predict: Callable, half: bool) -> Callable[[], float]:
    """Forward, backward, AdamW and one average, on a network of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in model.parameters()]

    def once() -> float:
        with bench.autocast(half):
            prediction = predict(model, inputs)
        loss = (prediction.float() - inputs[0]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, list(model.parameters()), 1e-4)
        return loss.item()

    return once


def training(options: argparse.Namespace) -> dict[str, Any]:
    bench, found = Bench(options, options.shape or "S"), {}
    for batch in options.batches or (4,):
        inputs = bench.inputs(batch)
        variants = {
            "reference fp32": (_copy(bench.reference), predict_reference, False),
            "reference bf16 autocast": (_copy(bench.reference), predict_reference, True),
            "untwine fp32": (_fresh(bench.ours), predict_ours, False),
            "untwine bf16 autocast": (_fresh(bench.ours), predict_ours, True),
            "untwine bf16 autocast compiled": (_fresh(bench.ours, compiled=True), predict_ours, True),
        }
        runs = {name: training_step(bench, inputs, *variant) for name, variant in variants.items()}
        first = {name: once() for name, once in runs.items()}
        table = bench.timed(runs, "reference bf16 autocast", 3 * batch * bench.flops)
        for name, row in table["rows"].items():
            row["first_loss"] = first[name]
        found[f"batch {batch}"] = table
    return found


def sample_ours(
    branches: dict[str, Branch], scale: float, x: Tensor, grid: Tensor, refresh: Collection[int] | None
) -> Tensor:
    guided = Guided(branches, classifier_free(scale, Interval(0.0, 0.7)), path=LinearPath())
    return integrate(Euler(), guided, x, grid, path=LinearPath(), refresh=refresh)


@torch.no_grad()
def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """DDT's guidance interval (0.3, 1) is (0, 0.7) here."""
    bench, found, steps, scale = Bench(options, options.shape or "B"), {}, options.steps, 2.0
    reference, ours, grid = bench.reference.eval(), bench.ours.eval(), TimeGrid(options.steps).times()
    for batch in options.batches or (1, 8):
        x, _, y = bench.inputs(batch)
        null = torch.full_like(y, 1000)
        branches = {"cond": Branch(ours, Condition(labels=y)), "null": Branch(ours, Condition(labels=null))}

        for every in options.refresh_every:
            sampler = bench.reference_sampler(steps, scale, (0.3, 1.0), every)
            refresh = None if every == 1 else range(0, steps, every)
            runs = {
                "reference": partial(sampler, reference, x, y, null),
                "untwine": partial(sample_ours, branches, scale, x, grid, refresh),
            }
            outputs = {name: once() for name, once in runs.items()}
            table = bench.timed(runs, "reference", 0.0, warmup=0)
            for row in table["rows"].values():
                del row["gflops"], row["peak_share"]
                row["images_per_second"] = round(1000 * batch / row["milliseconds"], 4)
            table["max_difference"] = float((outputs["untwine"] - outputs["reference"]).abs().max())
            table["largest_value"] = float(outputs["reference"].abs().max())
            table["shared"] = round(1 - len(range(0, steps, every)) / steps, 3)
            found[f"batch {batch}, refresh every {every}"] = table
    return found


def compilation(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the call to the first output, in a cold process for each: regional against the whole network."""
    bench = Bench(options, options.shape or "S")
    x, t, y = bench.inputs(2)
    found = {}
    for name in ("regional", "whole"):
        torch.compiler.reset()
        model = _fresh(bench.ours)
        run = model if name == "regional" else torch.compile(model, fullgraph=True)
        if name == "regional":
            compile_blocks(model)
        with torch._inductor.utils.fresh_cache():
            started = time.perf_counter()
            with torch.no_grad():
                run(x, t, Condition(labels=y))
            found[name] = {"seconds": round(time.perf_counter() - started, 2), "blocks": len(model.blocks)}
        decompile_blocks(model)
    found["ratio"] = round(found["whole"]["seconds"] / found["regional"]["seconds"], 2)
    return found


def optimizer(options: argparse.Namespace) -> dict[str, Any]:
    """One AdamW step, and one update of an average, beside torch's and diffusers' own averages."""
    from diffusers.training_utils import EMAModel
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    bench = Bench(options, options.shape or "S")
    model, gib = bench.ours, sum(p.numel() * 4 for p in bench.ours.parameters()) / 2**30
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    fused, plain = (torch.optim.AdamW(model.parameters(), lr=1e-6, fused=f, foreach=False) for f in (True, False))
    torch_average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    diffusers_average = EMAModel(model.parameters(), decay=0.999)
    constant, power = (EMA(profile, model.named_parameters()) for profile in (ConstantEMA(decay=0.999), PowerEMA()))
    runs: dict[str, Callable[[], Any]] = {
        "AdamW, one parameter at a time": plain.step,
        "AdamW fused (untwine)": fused.step,
        "average: torch AveragedModel": lambda: torch_average.update_parameters(model),
        "average: diffusers EMAModel": lambda: diffusers_average.step(model.parameters()),
        "average: untwine constant": lambda: constant.update(1000, 64),
        "average: untwine power": lambda: power.update(1000, 64),
    }
    rows = bench.timed(runs, "average: torch AveragedModel", 0.0)["rows"]
    return {"parameter_gib": round(gib, 3), "milliseconds": {name: row["milliseconds"] for name, row in rows.items()}}


BENCHMARKS = {
    "forward": forward,
    "training": training,
    "sampling": sampling,
    "compile": compilation,
    "optimizer": optimizer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--peer", type=Path, help="a checkout of github.com/MCG-NJU/DDT as the reference")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: B; S for training, compile and optimizer")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="of sampling")
    parser.add_argument("--refresh-every", type=int, nargs="+", default=[1, 2, 3, 5, 8])
    parser.add_argument("--tag", default="", help="ending of the name of the result")
    options = parser.parse_args()
    gc.collect()
    found = BENCHMARKS[options.benchmark](options)
    reference = "github.com/MCG-NJU/DDT" if options.peer else "plain eager network of our own"
    settings = {"reference": reference, "device": options.device, "shape": options.shape, "repeats": options.repeats}
    save(f"speed_{options.benchmark}{options.tag}", {"settings": settings, "results": found})


if __name__ == "__main__":
    main()
