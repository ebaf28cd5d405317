"""What the processes of a training step send to each other, on paper: bytes, and what that does to its time.

Every exchange is a ring of n processes: each sends (n - 1) / n of what is gathered or reduced, twice that for an
all-reduce. ``ddp`` reduces the float32 gradients once an update. ``fsdp`` gathers the weights in the precision of the
forward pass, before the forward and again before the backward pass of every micro-batch, and scatters the reduced
float32 gradients once an update. ``hsdp`` does the same among the processes that share one copy, and then reduces their
shards of the gradients over the copies. Left out are norms, losses and votes, which are a few numbers, and that the
little that lies outside the blocks is gathered up to three times as often.
"""

from __future__ import annotations

from dataclasses import dataclass

from untwine.training.distributed import Strategy


@dataclass(frozen=True)
class Links:
    """How fast one device sends, in GB/s (10^9 bytes), by the makers' figures for one direction."""

    inside: float
    """to devices of its machine"""
    between: float
    """to other machines, as its share of the machine's network"""
    per_machine: int = 8

    def __post_init__(self) -> None:
        if not (self.inside > 0 and self.between > 0 and self.per_machine >= 1):
            raise ValueError(f"links must be two speeds > 0 in GB/s, and at least 1 device a machine, got {self}")


LINKS = {
    "a100": Links(300, 25),
    "h100": Links(450, 50),
    "h200": Links(450, 50),
    "b200": Links(900, 50),
    "l40s": Links(32, 12.5),
    "rtx4090": Links(32, 3),
}


@dataclass(frozen=True)
class Communication:
    """Of one optimizer step; bytes are those that one device sends."""

    strategy: Strategy
    copies: int
    """of the weights"""
    shards: int
    """devices that share one copy"""
    gathered: int
    """of weights, for forward and backward passes"""
    reduced: int
    """of gradients"""
    seconds: float | None
    """if nothing else happens meanwhile; None where the links are not known"""

    @property
    def bytes(self) -> int:
        return self.gathered + self.reduced

    def scaling(self, compute_seconds: float) -> tuple[float, float] | None:
        """Share of the ideal speed-up: if nothing overlaps with arithmetic, and if everything does."""
        if self.seconds is None:
            return None
        apart, hidden = compute_seconds + self.seconds, max(compute_seconds, self.seconds)
        return compute_seconds / apart, compute_seconds / hidden


def communication(
    strategy: Strategy,
    num_parameters: int,
    *,
    count: int,
    shards: int,
    accumulation: int = 1,
    bytes_per_weight: int = 4,
    links: Links | None = None,
) -> Communication:
    """Of a model of ``num_parameters`` on ``count`` devices.

    Args:
        shards: devices that share one copy; 1 for ``ddp``, all for ``fsdp``.
        accumulation: micro-batches of an update.
        bytes_per_weight: 2 where the forward pass computes in bfloat16.
        links: None = the volume only.
    """
    copies = count // shards
    around = (shards - 1) / shards * num_parameters
    gathered = 2 * accumulation * bytes_per_weight * around
    scattered, averaged = 4 * around, 2 * (copies - 1) / copies * 4 * num_parameters / shards
    seconds = None
    if links is not None:
        # Neighbours share a copy, so its ring leaves the machine only where it is larger than that.
        within = links.inside if shards <= links.per_machine else links.between
        across = links.inside if count <= links.per_machine else links.between
        seconds = ((gathered + scattered) / within + averaged / across) / 1e9
    return Communication(strategy, copies, shards, round(gathered), round(scattered + averaged), seconds)
