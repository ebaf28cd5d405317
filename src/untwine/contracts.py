"""The small values that travel between the parts of untwine.

Letters used in shapes, here and everywhere: B batch, N tokens, D width, H heads, C channels, T frames, S solver steps.
A *sample* is one float tensor, batch first and channels second: ``(B, C, L)``, ``(B, C, H, W)`` or ``(B, C, T, H, W)``.
Time t runs from 0 (data) to 1 (noise); see :mod:`untwine.diffusion.paths`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

PredictionKind = Literal["velocity", "noise", "x0"]
T = TypeVar("T")


def map_tensors(fn: Callable[..., Tensor], value: T, *others: T) -> T:
    """Applies ``fn`` to the corresponding tensors of nested dataclasses, mappings and tuples; None stays None."""
    if isinstance(value, Tensor):
        return fn(value, *others)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {k: map_tensors(fn, v, *(o[k] for o in others)) for k, v in value.items()}  # type: ignore
    if isinstance(value, tuple):
        return tuple(map_tensors(fn, v, *(o[i] for o in others)) for i, v in enumerate(value))  # type: ignore
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: map_tensors(fn, getattr(value, f.name), *(getattr(o, f.name) for o in others))
            for f in fields(value)
        }
        return replace(value, **changed)
    return value


class _TensorValue:
    """Operations shared by the batch-first dataclasses of tensors."""

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """``Tensor.to`` on every tensor; a dtype is applied to floating tensors only."""

        def move(x: Tensor) -> Tensor:
            if x.is_floating_point():
                return x.to(*args, **kwargs)
            kept = [a for a in args if not isinstance(a, torch.dtype)]
            return x.to(*kept, **{k: v for k, v in kwargs.items() if k != "dtype"}) if kept or kwargs else x

        return map_tensors(move, self)

    def select(self: T, index: slice | Tensor) -> T:
        """Rows of the batch dimension."""
        return map_tensors(lambda x: x[index], self)


def cat(values: Sequence[T]) -> T:
    """Joins tensor values along the batch dimension; all must carry the same fields."""
    if len(values) == 1:
        return values[0]
    return map_tensors(lambda *xs: torch.cat(xs), values[0], *values[1:])


@dataclass(frozen=True)
class Tokens(_TensorValue):
    """A sequence of condition tokens."""

    values: Tensor
    """(B, L, D)"""
    mask: Tensor | None = None
    """(B, L) bool, True = a real token"""
    positions: Tensor | None = None
    """(B, L, A) coordinates on A axes, where the tokens take part in RoPE"""
    t: Tensor | None = None
    """(B,) or (B, L) own noise level in [0, 1]"""


@dataclass(frozen=True)
class Condition(_TensorValue):
    """What a sample is conditioned on. Tensors or nothing: a Python number in here would cost a compiled graph each.

    The null condition of a backbone comes from ``model.null(condition)``, never from a magic label.
    """

    labels: Tensor | None = None
    """(B,) int64 class labels in [0, num_classes)"""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """name -> (B, M, D); M = 1, frames or tokens"""
    tokens: dict[str, Tokens] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    """name -> (B, C, *grid): source latents, priors, known masks"""

    def keys(self) -> frozenset[str]:
        """Names of everything present: ``labels``, ``vectors.x``, ``tokens.x``, ``dense.x``."""
        named = {f"{group}.{k}" for group in ("vectors", "tokens", "dense") for k in getattr(self, group)}
        return frozenset(named | ({"labels"} if self.labels is not None else set()))

    def where(self, mask: Tensor, other: Condition) -> Condition:
        """Row b from ``self`` where ``mask[b]``, else from ``other``; ``mask`` is (B,) bool."""

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *([1] * (a.ndim - 1))), a, b)

        return map_tensors(choose, self, other)

    def drop(self, *keys: str) -> Condition:
        """Without the named entries (names as in :meth:`keys`)."""
        if unknown := set(keys) - self.keys():
            raise ValueError(f"drop: condition has no {sorted(unknown)}; it has {sorted(self.keys())}")
        kept = {
            group: {k: v for k, v in getattr(self, group).items() if f"{group}.{k}" not in keys}
            for group in ("vectors", "tokens", "dense")
        }
        return Condition(labels=None if "labels" in keys else self.labels, **kept)


@dataclass(frozen=True)
class Batch(_TensorValue):
    """One micro-batch of training data."""

    x0: Tensor
    """(B, C, *grid) clean samples, normalised by the codec"""
    condition: Condition
    index: Tensor
    """(B,) int64 global sample counter: all random draws of a sample are functions of (seed, name, index)"""
    features: dict[str, Tensor] = field(default_factory=dict)
    known: Tensor | None = None
    weight: Tensor | None = None
    """(B,) loss weights"""
    null: Condition | None = None
    """what a dropped condition becomes, where a frozen encoder knows it (the encoded empty prompt); else the model's"""


@dataclass(frozen=True)
class Draw:
    """The single random draw of a training step: ``x_t = alpha x0 + sigma noise`` and what the model should predict."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    """(B,) float32 in [0, 1]"""
    x_t: Tensor
    target: Tensor
    weight: Tensor | None = None
    known: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    """precomputed features of x0, for terms that align with them"""


@dataclass(frozen=True)
class Output:
    """What a backbone returns."""

    sample: Tensor
    """(B, C, *grid) in the unit that the backbone's ``predicts`` names"""
    features: dict[str, Tensor] = field(default_factory=dict)
    """site -> (B, N, D), for the sites asked for"""
    extra: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """What an objective returns; only the trainer calls ``total.backward()``."""

    total: Tensor
    parts: dict[str, Tensor]
    per_sample: Tensor | None = None
    """(B,) unweighted main loss, detached"""
    t: Tensor | None = None
    """(B,) the times it was taken at"""


@dataclass(frozen=True)
class StepInfo:
    """Where a sampling run stands: one evaluation of the network."""

    step: int
    stage: int
    num_steps: int
    refresh: bool = True
    """whether the encoder state is computed at this evaluation"""
    ahead: tuple[tuple[int, int, float], ...] = ()
    """(step, stage, t) of every evaluation that a state computed here serves, this one first"""


@dataclass(frozen=True)
class Site:
    """A place in a backbone that can be tapped, cached, pruned, quantized or adapted; its name is the module path."""

    kind: Literal["block", "attention", "mlp", "encoder", "head"]
    part: str
    """encoder, decoder or trunk"""
    index: int
    stream: str = "sample"
    role: Literal["output", "input"] = "output"


@dataclass(frozen=True)
class EncoderState(_TensorValue):
    """What the condition encoder of a decoupled backbone hands to its decoder; valid for several solver steps."""

    tokens: Tensor
    """(B, N, D) what the decoder is conditioned on"""
    hidden: Tensor
    """(B, N, D) the encoder's output before time is mixed in"""
    t: Tensor
    """(B,) the time it was computed at"""
    modulations: tuple[Tensor, ...] | None = None
    """per decoder block and final layer, what depends on the state alone; filled by ``model.modulate``"""
    features: dict[str, Tensor] = field(default_factory=dict)
    """site -> (B, N, D), those asked of the encoder"""


class PathLike(Protocol):
    """What :class:`Prediction` needs from a path."""

    def convert(self, value: Tensor, x: Tensor, t: Tensor, *, source: PredictionKind, target: str) -> Tensor: ...


@dataclass(frozen=True)
class Prediction:
    """A network output with its meaning; the other three meanings are computed through the path on demand."""

    value: Tensor
    kind: PredictionKind
    x: Tensor
    t: Tensor
    path: PathLike
    variance: Tensor | None = None
    """raw variance channels, where the backbone predicts them"""

    def _as(self, target: str) -> Tensor:
        if self.kind == target:
            return self.value
        return self.path.convert(self.value, self.x, self.t, source=self.kind, target=target)

    @property
    def velocity(self) -> Tensor:
        """``d x_t / d t``"""
        return self._as("velocity")

    @property
    def x0(self) -> Tensor:
        return self._as("x0")

    @property
    def noise(self) -> Tensor:
        return self._as("noise")

    @property
    def score(self) -> Tensor:
        """``grad log p_t(x_t) = -noise / sigma``"""
        return self._as("score")


def check_labels(labels: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """``labels`` as a (B,) int64 CPU tensor, checked on the host before any device sees them.

    Raises:
        ValueError: for a label outside [0, num_classes) — ``num_classes`` itself is the row of the null class, so
            that an off-by-one would silently sample without a condition — or for labels that are not integers.
    """
    tensor = torch.as_tensor(labels).cpu()
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"labels must be a list of integers, got shape {tuple(tensor.shape)} of {tensor.dtype}")
    if tensor.numel() and (tensor.min() < 0 or tensor.max() >= num_classes):
        bad = sorted({int(v) for v in tensor if v < 0 or v >= num_classes})[:5]
        raise ValueError(
            f"labels must be within [0, {num_classes - 1}], got {bad}; this model has {num_classes} classes"
        )
    return tensor.to(torch.int64)


for _value in (Tokens, Condition):
    torch.export.register_dataclass(_value, serialized_type_name=f"untwine.{_value.__name__}")
