"""What surrounds the training loop: signals that end it in order, deterministic kernels, a profiler."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from untwine.training.distributed import Distributed

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Inside, SIGTERM and SIGINT ask for an orderly end; the same one again, or any a second later, ends at once.

    The handler only sets a flag. Outside the main thread, where Python takes no handlers, signals act as ever.
    """

    def __init__(self, processes: Distributed) -> None:
        self.processes = processes
        self.received = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes on as SIGTERM the SIGINT that the terminal has sent to everybody: one wish, two signals.
        if self.received and (number == self.received or time.monotonic() - self._at > 1):
            os._exit(128 + number)
        self.received, self._at = number, time.monotonic()

    def agreed(self) -> int:
        """The signal that any process has received, on all of them; 0 for none. Collective, on the host."""
        return self.processes.agree_on(self.received)


def leave(number: int) -> NoReturn:
    """Ends the program as the signal would: status 130 for SIGINT, which Python knows as an exception, else 143."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Inside, operations whose result depends on timing are replaced or refused; before and after as it was."""
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


class Profiler:
    """Profiles ``steps`` training steps after a warm-up of two: ``profile.json`` for a trace viewer, and a table.

    Args:
        steps: None profiles nothing.
        folder: where ``profile.json`` (``profile-<rank>.json``) goes; open it in chrome://tracing or ui.perfetto.dev.
    """

    WARMUP = 2

    def __init__(self, steps: int | None, folder: Path, processes: Distributed) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"profile must be >= 1 step, got {steps}")
        self.steps, self.device = steps, processes.device
        self.path = folder / ("profile.json" if processes.is_main else f"profile-{processes.rank}.json")
        self._profile: Any = None

    def __enter__(self) -> Profiler:
        if self.steps is not None:
            self._profile = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=0, warmup=self.WARMUP, active=self.steps, repeat=1),
                on_trace_ready=self._report,
            )
            self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*exception)
            if not self.path.exists():
                logger.warning("profile: the run ended within the warm-up of %d steps", self.WARMUP)

    def step(self) -> None:
        """Called after each training step."""
        if self._profile is not None:
            self._profile.step()

    def _report(self, profile: Any) -> None:
        profile.export_chrome_trace(str(self.path))
        key = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=50)
        logger.info("%d steps profiled: %s\n%s", self.steps, self.path, table)
