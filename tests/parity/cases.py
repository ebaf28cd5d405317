"""Finds the reference cases: official inputs, weights and outputs, recorded by running the official code.

They lie in the folder that the environment variable UNTWINE_PARITY names, by default ``shared/parity`` beside the
checkout, one folder a system. Cases are chosen by what their JSON says (class, file, arguments), never by file name,
because more cases exist than are published. Without them a parity test is skipped as "PARITY NOT RUN", or fails where
UNTWINE_REQUIRE_PARITY=1.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(os.environ.get("UNTWINE_PARITY") or Path(__file__).parents[2].parent / "shared" / "parity")
NOT_RUN = "PARITY NOT RUN"


@dataclass(frozen=True)
class Case:
    """One reference case."""

    path: Path
    """of the JSON"""
    meta: dict[str, Any]

    def __str__(self) -> str:
        return self.path.stem

    @property
    def kwargs(self) -> dict[str, Any]:
        """The official constructor's arguments."""
        return self.meta["kwargs"]

    @property
    def tolerance(self) -> float:
        """Largest absolute difference allowed."""
        return float(self.meta["tolerance"])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything recorded, by its full name."""
        return load_file(self.path.with_suffix(".safetensors"))

    @property
    def state(self) -> dict[str, Tensor]:
        """Official weights by official name."""
        return self._group("state/")

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Recorded arguments and random draws."""
        return self._group("in/")

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What the official code returned."""
        return self._group("out/")

    def _group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def check(self, name: str, value: Tensor, *, relative: bool = False) -> None:
        """Asserts that ``value`` has the shape of output ``name`` and differs by at most the case's tolerance.

        ``relative`` allows the tolerance times the size of the expected value as well, where values reach far above 1.
        """
        torch.testing.assert_close(
            value.detach(),
            self.outputs[name],
            rtol=self.tolerance if relative else 0.0,
            atol=self.tolerance,
            check_dtype=False,
            msg=lambda message: f"{self}: {name}: {message}",
        )


class Missing:
    """Stands for a case that is not there: fails whatever uses it."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        pytest.fail(self._reason)


def cases(slug: str, *, klass: str, file: str = "") -> list[Any]:
    """What to parametrize a test with: the cases of a system whose class (and file) contain the given words.

    Without any, one entry that is skipped as PARITY NOT RUN, or fails where parity is required.
    """
    found: list[Any] = []
    for path in sorted((ROOT / slug).glob("*.json")):
        meta = json.loads(path.read_text())
        if klass in meta["class"] and file in meta["file"]:
            found.append(pytest.param(Case(path, meta), id=path.stem))
    if found:
        return found
    reason = f"{NOT_RUN}: no {klass} case of {slug} in {ROOT}; set UNTWINE_PARITY to the folder of reference cases"
    required = os.environ.get("UNTWINE_REQUIRE_PARITY") == "1"
    return [pytest.param(Missing(reason), id=NOT_RUN, marks=() if required else pytest.mark.skip(reason=reason))]
