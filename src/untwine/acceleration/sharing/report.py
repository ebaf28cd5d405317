"""What sharing saves and what it costs: work, memory, time, and the distance to the exact samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from untwine.acceleration.sharing.probe import Subject, check_subject, unshared
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import Guided
from untwine.diffusion.sampling import Sampling, sample


@dataclass(frozen=True)
class PartFlops:
    """Floating point operations of the parts of a decoupled backbone, for one sample."""

    encode: int
    modulate: int
    """the decoder's modulations from a state"""
    decode: int
    """with modulations given"""

    def of(self, guided: Guided) -> int:
        """Of one image of a finished run. Extrapolations are not counted: two operations a cached number."""
        return (
            guided.num_refreshes * self.encode
            + guided.num_modulations * self.modulate
            + guided.num_evaluations * self.decode
        )


@torch.no_grad()
def part_flops(pipe: Subject) -> PartFlops:
    """Counted on one image, multiply and add as two; of matrix products and attention, as ``Backbone.flops`` counts."""
    check_subject(pipe)
    model, index = pipe.model, torch.zeros(1, dtype=torch.int64)
    x = torch.zeros(1, *pipe.latent_shape, device=model.device)
    times = torch.full((1,), 0.5, device=model.device)
    encode, modulate, decode = (FlopCounterMode(display=False) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know every fused attention
        with encode:
            state = model.encode(x, times, pipe.in_turn(index)[0].to(model.device))
        with modulate:
            state = model.modulate(state)
        with decode:
            model.decode(x, state)
    return PartFlops(encode.get_total_flops(), modulate.get_total_flops(), decode.get_total_flops())


@dataclass(frozen=True)
class Run:
    """One set of final latents, and how it came about."""

    latents: Tensor
    guided: Guided
    seconds: float


def run(pipe: Subject, sampling: Sampling, index: Tensor, *, seed: int = 0) -> Run:
    """Samples the images ``index`` (B,), of the classes in turn."""
    started = time.perf_counter()
    condition, null = pipe.in_turn(index)
    latents, guided = sample(
        pipe.model,
        condition,
        tuple(pipe.latent_shape),
        index,
        draws=Draws(seed),
        null=null,
        sampling=sampling,
        path=pipe.path,
        device=pipe.model.device,
    )
    if latents.is_cuda:
        torch.cuda.synchronize()
    return Run(latents, guided, time.perf_counter() - started)


def compare(
    pipe: Subject, settings: Mapping[str, Sampling], *, num_images: int = 16, seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, dict[str, Any]]:
    """Each of ``settings`` against the exact run of the same noise; the runs are timed in turn (A B A B ...).

    The exact run has the sampler of the first of them. A row holds ``refreshed`` and ``reused`` (steps),
    ``encoder_passes`` and ``network_evaluations`` (an image, branches counted singly), ``cache_bytes``, ``flops`` (an
    image), ``flops_saved`` (share), ``seconds`` (median of a batch), ``drift``: the mean squared distance of the final
    latents, and ``drift_median``: of the images' own, because few images make most of a mean.
    """
    parts, index = part_flops(pipe), torch.arange(num_images)
    every = {"exact": unshared(next(iter(settings.values()))), **settings}
    run(pipe, replace(every["exact"], num_inference_steps=1), index)  # warm-up
    runs: dict[str, list[Run]] = {name: [] for name in every}
    drifts: dict[str, list[Tensor]] = {name: [] for name in every}
    for seed in seeds:
        for name, sampling in every.items():
            done = run(pipe, sampling, index, seed=seed)
            runs[name].append(done)
            exact = runs["exact"][-1].latents
            drifts[name].append((done.latents - exact).double().square().flatten(1).mean(1).cpu())
    total = parts.of(runs["exact"][0].guided)
    return {
        name: {
            **_work(every[name], runs[name][0].guided, parts, total),
            "seconds": statistics.median(done.seconds for done in runs[name]),
            "drift": float(torch.cat(drifts[name]).mean()),
            "drift_median": float(torch.cat(drifts[name]).median()),
        }
        for name in every
    }


def _work(sampling: Sampling, guided: Guided, parts: PartFlops, exact: int) -> dict[str, Any]:
    steps, refresh = sampling.num_inference_steps, sampling.refresh_steps
    refreshed = steps if refresh is None else len(set(refresh))
    return {
        "num_steps": steps,
        "refreshed": refreshed,
        "reused": steps - refreshed,
        "forecast_order": sampling.forecast_order,
        "encoder_passes": guided.num_refreshes,
        "network_evaluations": guided.num_evaluations,
        "cache_bytes": guided.cache_bytes,
        "flops": parts.of(guided),
        "flops_saved": 1 - parts.of(guided) / exact,
    }


def fewer_steps(pipe: Subject, shared: Sequence[Sampling]) -> list[int]:
    """How many steps of the unshared sampler cost what each of ``shared`` costs: the honest alternative to sharing."""
    parts, one = part_flops(pipe), torch.zeros(1, dtype=torch.int64)
    num_steps = shared[0].num_inference_steps
    exact = parts.of(run(pipe, unshared(shared[0]), one).guided) / num_steps
    costs = [parts.of(run(pipe, sampling, one).guided) for sampling in shared]
    return sorted({min(num_steps, max(1, round(cost / exact))) for cost in costs})
