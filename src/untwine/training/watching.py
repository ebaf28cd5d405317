"""Everybody who watches a run: ``log.jsonl``, the console or a panel on the terminal, the loggers of the recipe.

None of them reads the device, and none of them can stop the run.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from untwine.training.distributed import Distributed, on_main
from untwine.training.loggers import Sink
from untwine.training.metering import RunLog
from untwine.training.recipe import Recipe

logger = logging.getLogger(__name__)
_REDRAW_SECONDS = 0.5


class Watch:
    """Tells everybody; on other processes than the main one, nobody.

    Args:
        console: where people look; a terminal gets a live panel, anything else lines in Python's log.
    """

    def __init__(self, folder: Path, recipe: Recipe, processes: Distributed, console: Console | None = None) -> None:
        self.folder, self.recipe, self.enabled = folder, recipe, processes.is_main
        self.log = RunLog(folder / "log.jsonl", enabled=self.enabled)
        self.sinks: dict[str, Sink] = {}
        console = console or Console(stderr=True)
        on_terminal = self.enabled and console.file.isatty() and not console.is_dumb_terminal
        self.panel = LivePanel(console, f"{recipe.name}  {folder}", recipe.train.num_steps) if on_terminal else None

    def __enter__(self) -> Watch:
        if self.panel is not None:
            self.panel.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.panel is not None:
            self.panel.stop()
        self._tell(lambda sink: sink.close())

    def open_loggers(self, step: int) -> None:
        """Opens the loggers of the recipe; collective.

        Raises:
            ImportError: where the package of one is missing.
        """
        config = self.recipe.to_dict()
        for config_of in self.recipe.train.loggers:

            def open_one(chosen=config_of) -> None:
                self.sinks[type(chosen).__name__] = chosen.open(self.folder, self.recipe.name, config, step)

            on_main(open_one)

    def step(self, step: int) -> None:
        """Hears of each finished step."""
        if self.panel is not None:
            self.panel.step(step)

    def train(self, **values: Any) -> dict[str, Any]:
        """The numbers of the training steps since the last time."""
        line = self._write("train", values)
        if self.panel is not None:
            self.panel.show(**values)
        elif self.enabled:
            left = timedelta(seconds=round(values["eta_seconds"]))
            loss = f"loss {values['loss']:.4f}  " if "loss" in values else ""  # none if only other networks moved
            told = values["step"], loss, values["lr"], values["images_per_second"], left
            logger.info("step %d  %slr %.2e  %.4g images/s  %s left", *told)
        return line

    def validation(self, **values: Any) -> dict[str, Any]:
        """The numbers of a validation."""
        if self.panel is not None:
            self.panel.show(validation_loss=values["loss"])
        told = values["step"], values["loss"], values["weights"], values["triples"]
        logger.info("step %d  validation loss %.4f (%s, %d triples)", *told)
        return self._write("validation", values)

    def evaluation(self, **values: Any) -> dict[str, Any]:
        """The numbers of an evaluation."""
        told = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
        logger.info("step %d  %s (%s)", values["step"], told, values["weights"])
        return self._write("evaluation", values)

    def event(self, kind: str, **values: Any) -> None:
        """Anything else that belongs into ``log.jsonl``."""
        self.log.write(kind, **values)

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture that was written."""
        self._tell(lambda sink: sink.image(step, name, path))

    def _write(self, kind: str, values: dict[str, Any]) -> dict[str, Any]:
        numbers = flat(kind, values)
        self._tell(lambda sink: sink.log(values["step"], numbers))
        return self.log.write(kind, **values)

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                what(sink)
            except Exception as error:  # a broken connection or a full disk is no reason to lose a run
                logger.warning("%s failed, and hears no more of this run: %s", name, error)
                del self.sinks[name]


def flat(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Numbers by name: ``train/loss``, and ``train/loss_per_time_bin/3`` for the members of a list."""
    found: dict[str, float] = {}
    for name, value in values.items():
        members = {f"/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {"": value}
        found |= {f"{kind}/{name}{i}": v for i, v in members.items() if isinstance(v, int | float)}
    found.pop(f"{kind}/step", None)
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


class LivePanel:
    """A panel at the foot of the terminal, above which log lines go by."""

    def __init__(self, console: Console, title: str, num_steps: int) -> None:
        self.title, self.num_steps = title, num_steps
        self.values: dict[str, Any] = {"step": 0}
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._render)
        self._drawn = 0.0
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self) -> None:
        """Appears; handlers of the log that write to the terminal write above it from now on."""
        original = sys.stderr
        self._live.start()
        for handler in logging.getLogger("untwine").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is original:
                self._handlers.append((handler, original))
                handler.setStream(sys.stderr)

    def stop(self) -> None:
        """Stays on the screen as it is."""
        self._live.refresh()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._live.stop()

    def show(self, **values: Any) -> None:
        """New numbers, by their names in ``log.jsonl``."""
        self.values |= values
        self._redraw()

    def step(self, step: int) -> None:
        """A step was finished; drawn only now and then."""
        self.values["step"] = step
        if time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._redraw()

    def _redraw(self) -> None:
        self._drawn = time.monotonic()
        self._live.refresh()

    def _render(self) -> RenderableType:
        step = self.values["step"]
        progress = Table.grid(padding=(0, 2))
        progress.add_row(f"step {step}/{self.num_steps}", ProgressBar(self.num_steps, step, width=30), self._left())
        numbers = Table.grid(padding=(0, 2))
        told = {label: text.format(self.values[name]) for name, label, text in _SHOWN if self._has(name)}
        numbers.add_row(*(f"[dim]{label}[/] {text}" for label, text in list(told.items())[:4]))
        numbers.add_row(*(f"[dim]{label}[/] {text}" for label, text in list(told.items())[4:]))
        return Panel(Group(progress, numbers), title=self.title, title_align="left", box=box.ROUNDED, expand=False)

    def _left(self) -> str:
        seconds = self.values.get("eta_seconds")
        return "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"

    def _has(self, name: str) -> bool:
        return self.values.get(name) is not None


_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("validation_loss", "validation", "{:.4f}"),
    ("lr", "lr", "{:.2e}"),
    ("grad_norm", "grad norm", "{:.3f}"),
    ("images_per_second", "images/s", "{:.1f}"),
    ("memory_mib", "MiB", "{:.0f}"),
    ("gflops", "GFLOP/s", "{:.1f}"),
    ("peak_share", "of GEMM peak", "{:.0%}"),
)
