"""Named, versioned protocols: everything besides the pictures that a number depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from untwine.encoders import ENCODERS
from untwine.encoders.base import Encoder
from untwine.registry import did_you_mean

METRICS = ("fid", "fd", "sfid", "is", "kid", "precision_recall", "density_coverage")
"""``fid`` is ``fd`` under the name that is reserved for Inception features"""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How samples are compared with a reference. A published number names one, and its sample count."""

    name: str
    version: int = 1
    encoder: str
    encoder_options: Mapping[str, Any] = field(default_factory=dict)
    num_samples: int
    """exactly so many; further ones are ignored, fewer are refused"""
    max_reference: int = 50_000
    """a larger reference is thinned to so many pictures, chosen by the seed"""
    metrics: tuple[str, ...]
    rounding: Literal["round", "truncate"] = "round"
    """how float pictures become 8 bits: DiT, SiT, DDT round; REPA and RAE truncate, half a grey level darker"""
    principal_axes: int = 64
    """of the reference features, on which features are projected where a set has fewer than ``project_below``"""
    project_below: int = 3000
    """0 = never; too few pictures are then refused"""
    neighbours: int = 3
    """k of precision and recall"""
    manifold_reference: int = 10_000
    """reference pictures that precision, recall, density and coverage use, at most"""
    inception_splits: int = 10
    kernel_subsets: int = 100
    kernel_subset_size: int = 1000
    seed: int = 2020
    """of the random choices of reference pictures and KID subsets"""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"metrics: unknown {unknown[0]!r}{did_you_mean(unknown[0], list(METRICS))}")
        if "fid" in self.metrics and self.encoder != "inception":
            raise ValueError(f"metrics: 'fid' means Inception features; with encoder {self.encoder!r} use 'fd'")
        if self.num_samples < 2 or self.max_reference < 2:
            raise ValueError(
                f"num_samples and max_reference must be >= 2, got {self.num_samples} and {self.max_reference}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``modified`` lists the fields in which it differs from the registered one of its name."""
        values = {**asdict(self), "metrics": list(self.metrics), "encoder_options": dict(self.encoder_options)}
        known = PROTOCOLS.get(self.name)
        changed = [] if known is None else [key for key in asdict(known) if getattr(known, key) != getattr(self, key)]
        return {**values, "modified": changed}

    def build_encoder(self, **options: Any) -> Encoder:
        """The encoder; ``options`` such as ``weights`` add to those of the protocol."""
        return ENCODERS[self.encoder](**{**self.encoder_options, **options})

    def axes_for(self, samples: int, reference: int | None) -> int | None:
        """Principal axes for sets of these sizes, None = all features; a size that is not known is not small."""
        smallest = min(samples, samples if reference is None else reference)
        return self.principal_axes if smallest < self.project_below else None

    def to_uint8(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] as levels 0..255; 8-bit pictures are left as they are."""
        if images.dtype == torch.uint8:
            return images
        if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
            raise ValueError(f"images must be uint8, or float within [0, 1], got {images.dtype}")
        levels = images.float() * 255
        return (levels.round() if self.rounding == "round" else levels).to(torch.uint8)


_OPEN = {"encoder": "efflite0", "metrics": ("fd", "kid", "precision_recall", "density_coverage")}
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="adm-50k",
            encoder="inception",
            num_samples=50_000,
            metrics=("fid", "sfid", "is", "precision_recall"),
            project_below=0,
        ),
        Protocol(name="fd-efflite0-5k", num_samples=5000, **_OPEN),
        Protocol(name="fd-efflite0-1k", num_samples=1000, kernel_subsets=20, kernel_subset_size=500, **_OPEN),
        Protocol(
            name="kid-efflite0-500",
            encoder="efflite0",
            num_samples=500,
            metrics=("kid",),
            kernel_subsets=50,
            kernel_subset_size=250,
        ),
        Protocol(name="fd-dinov2-50k", encoder="dinov2", num_samples=50_000, metrics=("fd", "kid", "precision_recall")),
    )
}
DEFAULT = "fd-efflite0-1k"


def find_protocol(name: str | Protocol, *, num_samples: int | None = None) -> Protocol:
    """The registered protocol, with another sample count where one is given; its result then says so.

    Raises:
        ValueError: for an unknown name; the message has the closest known one.
    """
    if isinstance(name, str) and name not in PROTOCOLS:
        raise ValueError(f"protocol: unknown {name!r}{did_you_mean(name, list(PROTOCOLS))}")
    protocol = PROTOCOLS[name] if isinstance(name, str) else name
    if num_samples is None or num_samples == protocol.num_samples:
        return protocol
    size = min(protocol.kernel_subset_size, num_samples)
    return replace(protocol, num_samples=num_samples, kernel_subset_size=size)
