"""How fast a run is: images and arithmetic per second, the latter as a share of what the machine can multiply."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from untwine.training.distributed import Distributed

TRAINING = 3
"""passes that a training step costs, in forward passes: one forward, one for each operand's gradient"""


def flops(model: nn.Module, sample_shape: tuple[int, ...], num_text_tokens: int = 0) -> int | None:
    """Operations of one forward pass over one sample (C, *grid), by the model's own ``flops``; None without one.

    Args:
        num_text_tokens: length of the texts of a model of text.
    """
    declared: Callable[..., int] | None = getattr(model, "flops", None)
    if declared is None:
        return None
    return declared(sample_shape, num_text_tokens) if num_text_tokens else declared(sample_shape)


@torch.no_grad()
def gemm_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations a second of a large square matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # constant operands would run faster than real ones
    a = torch.rand(size, size, generator=generator, device=device).to(dtype)
    best = math.inf
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Waits for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory taken so far: by tensors on a GPU, by this process on a CPU; None where nobody counts it."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with suppress(ImportError):
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
    return None


class Speed:
    """The pace of the training steps alone: what happens inside :meth:`paused` does not count.

    Args:
        batch_size: images of a step, over all processes.
        flops_per_image: of one forward pass, None where unknown.
        dtype: what the forward pass computes in; the matrix product that is the measure runs in it.
    """

    def __init__(
        self, processes: Distributed, batch_size: int, flops_per_image: int | None, dtype: torch.dtype
    ) -> None:
        self.processes, self.batch_size, self.flops_per_image = processes, batch_size, flops_per_image
        self.peak = gemm_peak(processes.device, dtype)
        self._steps, self._since = 0, time.perf_counter()

    def step(self) -> None:
        """Counts a finished step."""
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is no training step."""
        synchronize(self.processes.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def read(self, remaining_steps: int) -> dict[str, Any]:
        """Since the last reading; right after something was read from the device, so that nothing is pending.

        ``gflops`` is per process and a second, ``peak_share`` its share of the matrix product measured at the start.
        """
        now = time.perf_counter()
        seconds = (now - self._since) / max(1, self._steps)
        self._steps, self._since = 0, now
        found = {
            "images_per_second": round(self.batch_size / seconds, 2),
            "eta_seconds": round(remaining_steps * seconds, 1),
            "memory_mib": peak_memory_mib(self.processes.device),
        }
        if self.flops_per_image is not None:
            work = TRAINING * self.flops_per_image * self.batch_size / self.processes.world_size / seconds
            found |= {"gflops": round(work / 1e9, 2), "peak_share": round(work / self.peak, 4)}
        return found
