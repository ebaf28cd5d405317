"""What attaches parameters to a model, and what detaches them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn


class Attached(ABC):
    """An adapter on a model: a context manager whose exit leaves the model as it was, bit for bit."""

    @abstractmethod
    def detach(self) -> None:
        """Takes the adapter off; the model computes what it computed before."""

    @abstractmethod
    def reset(self) -> None:
        """Back to a fresh adapter, which changes nothing."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What was matched, and how many parameters that adds."""

    @abstractmethod
    def bake(self) -> None:
        """Makes the adapter part of the model's own weights for good, as cheap as the model alone."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the adapter alone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


class Adapter(ABC):
    """Options of an adapter; :meth:`attach` puts it on a model whose own parameters it freezes."""

    kinds: ClassVar[str] = "untwine.adapters:ADAPTERS"

    @abstractmethod
    def attach(self, model: nn.Module) -> Attached:
        """Raises ValueError where nothing in the model matches."""
