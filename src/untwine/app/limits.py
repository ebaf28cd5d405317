"""What a request may ask for, and how a value from outside becomes one that is safe to use."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any


class Refused(ValueError):
    """A request that cannot be served; its message is meant for the page and names no path."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on one request, checked before anything is computed."""

    max_count: int = 16
    """images of one request"""
    max_steps: int = 250
    """solver steps"""
    max_side: int = 1024
    """height and width in pixels"""
    max_megapixels: float = 4.0
    """all images of a request together"""
    max_prompt: int = 1000
    """characters of a prompt"""
    max_samples: int = 1000
    """images of an evaluation"""
    max_queue: int = 16
    """requests that wait; further ones are told to come back"""
    max_output_mib: int = 512
    """of the folder for what is made; the oldest goes first"""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be > 0, got {getattr(self, field.name)}")

    def check_size(self, size: tuple[int, int], count: int) -> None:
        """Raises Refused where ``count`` pictures of (height, width) pixels are too much, and says what would do."""
        height, width = size
        if height * width * count > self.max_megapixels * 1e6:
            most = int(self.max_megapixels * 1e6 // (height * width))
            instead = f"ask for at most {most} images of this size, or for smaller ones" if most else "make it smaller"
            raise Refused(
                f"{count} images of {height} x {width} pixels take about {_mib(count * height * width)} MiB of numbers "
                f"a layer, more than the {self.max_megapixels:g} megapixels of a request; {instead}"
            )


def _mib(pixels: int) -> int:
    """float32 in three channels"""
    return max(1, round(pixels * 3 * 4 / 2**20))


def whole(name: str, value: Any, low: int, high: int) -> int:
    """``value``, a number or its digits, as an integer within [low, high]; raises Refused with the range."""
    number: Any = int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,10}", value) else value
    fits = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not fits or number != int(number) or not low <= number <= high:
        raise Refused(f"{name} must be a whole number within [{low}, {high}], got {shown(value)}; choose one of those")
    return int(number)


def real(name: str, value: Any, low: float, high: float) -> float:
    """``value`` as a number within [low, high]; raises Refused with the range."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
        raise Refused(f"{name} must be a number within [{low:g}, {high:g}], got {shown(value)}; choose one of those")
    return float(value)


def text(name: str, value: Any, longest: int) -> str:
    """``value`` as one line without control characters; raises Refused where it is too long or no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused(f"{name} must be a text, got {shown(value)}")
    if len(value) > longest:
        raise Refused(f"{name} has {len(value)} characters, and at most {longest} are taken; shorten it")
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def one_of(name: str, value: Any, known: Any) -> Any:
    """``value`` where it is one of ``known``, of which at most the first twenty are named; raises Refused else."""
    if not isinstance(value, str) or value not in known:
        told = ", ".join(list(known)[:20]) or "none"
        raise Refused(f"{name} {shown(value)} is not on the list; choose one of: {told}")
    return value


def shown(value: Any) -> str:
    """A value from outside, short enough for a message."""
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:57]}..."
