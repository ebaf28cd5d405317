"""Where a run reports beside its ``log.jsonl``: TensorBoard, Weights & Biases, trackio, or a class of yours.

A recipe names them in ``train.loggers``. None is imported unless it is named, and none sends anything anywhere unless
it is told to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from untwine.registry import Registry

LOGGERS = Registry(
    "logger",
    {
        "tensorboard": "untwine.training.loggers:TensorBoard",
        "wandb": "untwine.training.loggers:Wandb",
        "trackio": "untwine.training.loggers:Trackio",
    },
)


class Sink(Protocol):
    """An open logger; only the main process has one."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by names such as ``train/loss``."""

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture that was written to ``path``."""

    def close(self) -> None:
        """Flushes and ends."""


class Logger:
    """What opens a :class:`Sink`."""

    kinds: ClassVar[str] = "untwine.training.loggers:LOGGERS"

    def open(self, folder: Path, name: str, config: dict[str, Any], step: int) -> Sink:
        """Starts, or continues at ``step``, the report on the run in ``folder``.

        Raises:
            ImportError: where an optional package is missing; the message says how to install it.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TensorBoard(Logger):
    """Event files in ``<run>/tensorboard``: ``tensorboard --logdir runs``."""

    def open(self, folder: Path, name: str, config: dict[str, Any], step: int) -> Sink:
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        return _TensorBoardSink(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1))


class _TensorBoardSink:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


@dataclass(frozen=True, kw_only=True)
class Wandb(Logger):
    """Weights & Biases; offline files in ``<run>/wandb`` unless ``mode`` says otherwise (``wandb sync`` sends them)."""

    project: str = "untwine"
    mode: Literal["offline", "online"] = "offline"

    def open(self, folder: Path, name: str, config: dict[str, Any], step: int) -> Sink:
        wandb = _require("wandb")
        settings = {"project": self.project, "mode": self.mode, "dir": str(folder), "resume": "allow"}
        return _RunSink(wandb, wandb.init(name=name, id=_identity(folder), config=config, **settings))


@dataclass(frozen=True, kw_only=True)
class Trackio(Logger):
    """trackio, which keeps its tables on this machine: ``trackio show``."""

    project: str = "untwine"

    def open(self, folder: Path, name: str, config: dict[str, Any], step: int) -> Sink:
        trackio = _require("trackio")
        unique = f"{name}-{_identity(folder)}"  # it knows runs by name
        return _RunSink(trackio, trackio.init(project=self.project, name=unique, config=config, resume="allow"))


class _RunSink:
    """Of the packages that share wandb's interface."""

    def __init__(self, package: Any, run: Any) -> None:
        self.package, self.run = package, run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.package.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


def _identity(folder: Path) -> str:
    """The same for every part of a run, and another for every folder."""
    return hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()


def _require(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"train.loggers: {package} is not installed; pip install 'untwine[{package}]', or leave it out"
        ) from error
