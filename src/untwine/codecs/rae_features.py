"""Spatial maps of frozen encoders: what representation autoencoders invert, compare and discriminate by."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from untwine.config import Component
from untwine.encoders.base import Encoder

TOKENS, POOLED = "tokens", "pooled"
"""sites that every encoder has: its own map, and its one vector a picture, as a map of one position"""


@dataclass(frozen=True, kw_only=True)
class FeatureMaps:
    """Maps (B, C, h, w) of a frozen encoder at named sites; it is built at the first use and follows the pictures.

    A value, not a module: the encoder's weights appear in no checkpoint and in no optimizer.
    """

    encoder: Component[Encoder] = field(default=Component(Encoder.kinds, "efflite0", {"side": 64}))
    sites: tuple[str, ...] = (TOKENS,)
    """module paths in the encoder whose output is a map (B, C, h, w) or tokens (B, N, C); ``tokens``: its own map;
    ``pooled``: its one vector a picture"""

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites must name at least one place in the encoder, got none")

    @cached_property
    def network(self) -> Encoder:
        """The encoder."""
        with torch.device("cpu"):
            return self.encoder.build()

    def __call__(self, images: Tensor) -> list[Tensor]:
        """One map a site, of pictures (B, 3, H, W) in [0, 1]; gradients reach the pictures.

        Raises:
            ValueError: for a site that the encoder lacks, or that is no square map.
        """
        network, found = self.network.to(images.device), {}
        with ExitStack() as hooks:
            for site in self.sites:
                if site not in (TOKENS, POOLED):
                    handle = self._module(site).register_forward_hook(partial(_keep, found, site))
                    hooks.callback(handle.remove)
            features = network(images)
        found |= {TOKENS: features.tokens, POOLED: features.pooled[..., None, None]}
        return [_as_map(found.get(site), f"{network.name} at {site!r}") for site in self.sites]

    @torch.no_grad()
    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) a site, for square pictures."""
        with torch.device("cpu"):
            return [tuple(value.shape[1:]) for value in self(torch.zeros(1, 3, 256, 256))]  # type: ignore[misc]

    def _module(self, site: str) -> torch.nn.Module:
        try:
            return self.network.get_submodule(site)
        except AttributeError as error:
            raise ValueError(f"sites: {self.network.name} has no module {site!r}: {error}") from error


def _keep(found: dict[str, Any], site: str, module: Any, args: Any, output: Any) -> None:
    found[site] = output[0] if isinstance(output, tuple) else output


def _as_map(value: Any, where: str) -> Tensor:
    """A map as it is, or tokens as a square one without the class and register tokens that come before."""
    if isinstance(value, Tensor) and value.ndim == 4:
        return value
    if not isinstance(value, Tensor) or value.ndim != 3:
        shape = tuple(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(
            f"sites: {where} gives no spatial map (B, C, h, w) or tokens (B, N, C), but {shape}; name the module of "
            "one, such as a block"
        )
    side = math.isqrt(value.shape[1])
    return value[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))
