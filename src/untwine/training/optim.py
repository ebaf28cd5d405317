"""Optimizers with flat, resumable state, learning rate schedules in optimizer steps, clipping of sharded gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from untwine.registry import Registry

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "untwine.training.optim:AdamW",
        "muon": "untwine.training.optim:Muon",
    },
)
SCHEDULES = Registry(
    "learning rate schedule",
    {
        "constant": "untwine.training.optim:ConstantSchedule",
        "linear": "untwine.training.optim:LinearSchedule",
        "cosine": "untwine.training.optim:CosineSchedule",
    },
)
NamedParams = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Factors:
    """What one parameter's hyper-parameters are multiplied with, see :mod:`untwine.training.parametrization`."""

    lr: float = 1.0
    """of AdamW; a step of Muon, which is orthogonal, is as large in its square root"""
    weight_decay: float = 1.0
    eps: float = 1.0


class OptimizerSet:
    """One or more torch optimizers that step together, with their state by name.

    The state exists from the start (zeros), so that a checkpoint can be loaded in place before the first step.
    """

    def __init__(self, members: Iterable[Optimizer], names: Mapping[Tensor, str]) -> None:
        self._members = list(members)
        self._names = names
        self._base = [[group["lr"] for group in member.param_groups] for member in self._members]

    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for member in self._members:
            member.step()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for member in self._members:
            member.zero_grad(set_to_none=True)

    def set_lr(self, multiplier: float) -> None:
        """Sets every learning rate to ``multiplier`` times its configured value."""
        for member, base in zip(self._members, self._base):
            for group, lr in zip(member.param_groups, base):
                group["lr"] = lr * multiplier

    @property
    def parameters(self) -> list[Tensor]:
        """What is updated."""
        return list(self._names)

    @property
    def lr(self) -> tuple[float, ...]:
        """The learning rates in use, one a parameter group."""
        return tuple(group["lr"] for member in self._members for group in member.param_groups)

    def tensors(self) -> dict[str, Tensor]:
        """The state itself as ``<parameter>.<state>``, to be saved, or filled in place."""
        return {
            f"{self._names[p]}.{key}": value
            for member in self._members
            for p, state in member.state.items()
            for key, value in state.items()
        }


class OptimizerConfig:
    """What builds an :class:`OptimizerSet`."""

    kinds: ClassVar[str] = "untwine.training.optim:OPTIMIZERS"

    def build(self, named_params: NamedParams, factors: Mapping[str, Factors] = MappingProxyType({})) -> OptimizerSet:
        """The optimizer over those of ``named_params`` that require a gradient, their state zero.

        Args:
            factors: by name; those of others are 1.

        Raises:
            ValueError: where nothing is trainable, or a parameter is not float32 (its moments would not be either).
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_vectors: bool = False
    """whether norms' weights and biases (1-D) decay as well"""

    def __post_init__(self) -> None:
        _check_rates(lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be within [0, 1), got {self.betas}")

    def build(self, named_params: NamedParams, factors: Mapping[str, Factors] = MappingProxyType({})) -> OptimizerSet:
        names = _trainable(named_params)
        return OptimizerSet([self._over(names, factors)], names)

    def _over(self, params: Mapping[Tensor, str], factors: Mapping[str, Factors]) -> Optimizer:
        def group_of(p: Tensor) -> dict[str, float]:
            factor, decays = factors.get(params[p], Factors()), p.ndim > 1 or self.decay_vectors
            decay = self.weight_decay * factor.weight_decay if decays else 0.0
            return {"lr": self.lr * factor.lr, "weight_decay": decay, "eps": self.eps * factor.eps}

        member = torch.optim.AdamW(
            _groups(params, group_of),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        for p in params:
            member.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return member


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Momentum orthogonalised by Newton-Schulz for the matrices inside the blocks, AdamW for everything else.

    ``torch.optim.Muon`` (K. Jordan 2024) with the step size of arXiv 2502.16982, whose root mean square is AdamW's.
    """

    lr: float = 1e-3
    momentum: float = 0.95
    weight_decay: float = 0.0
    matrices: str = r"(^|\.)\w*(blocks|layers)\.\d+\."
    """regular expression: which names are inside a block"""
    rest: AdamW = field(default_factory=AdamW)
    """for embeddings, norms, biases and the final layer"""

    def __post_init__(self) -> None:
        _check_rates(lr=self.lr, weight_decay=self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be within [0, 1), got {self.momentum}")

    def build(self, named_params: NamedParams, factors: Mapping[str, Factors] = MappingProxyType({})) -> OptimizerSet:
        names = _trainable(named_params)
        matrices = [p for p, name in names.items() if p.ndim == 2 and re.search(self.matrices, name)]
        if not matrices:
            raise ValueError(f"matrices: no 2-D parameter matches {self.matrices!r}; name the blocks, or use adamw")
        chosen = set(matrices)
        others = {p: name for p, name in names.items() if p not in chosen}

        def group_of(p: Tensor) -> dict[str, float]:
            # A step of match_rms_adamw has the spectral norm 0.2 sqrt(max(in, out)) lr: muP wants it independent of
            # the width (arXiv 2310.17813).
            factor = factors.get(names[p], Factors())
            return {"lr": self.lr * factor.lr**0.5, "weight_decay": self.weight_decay * factor.weight_decay**0.5}

        member = torch.optim.Muon(
            _groups(matrices, group_of),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        for p in matrices:
            member.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        return OptimizerSet([member, *([self.rest._over(others, factors)] if others else [])], names)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the learning rate is multiplied with: a linear warm-up, then a hold, then :meth:`_shape`."""

    kinds: ClassVar[str] = "untwine.training.optim:SCHEDULES"

    warmup_steps: int = 0
    hold_steps: int = 0
    """at 1 between the warm-up and the decay"""
    end_step: int | None = None
    """where the decay ends, which may lie behind the end of the run; None = at its end"""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "hold_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.end_step is not None and self.end_step <= self.warmup_steps + self.hold_steps:
            raise ValueError(f"end_step must be > warmup_steps + hold_steps, got {self.end_step}")

    def multiplier(self, step: int, num_steps: int) -> float:
        """For optimizer step ``step``, counted from 0, of ``num_steps``: in [0, 1], the last value beyond the end."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        start = self.warmup_steps + self.hold_steps
        end = num_steps if self.end_step is None else self.end_step
        return self._shape(min(1.0, max(0.0, (step - start) / max(1, end - start))))

    def _shape(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(Schedule):
    """1 after the warm-up."""

    def _shape(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class _Decay(Schedule):
    final: float = 0.0
    """the multiplier at the end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be within [0, 1], got {self.final}")


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(_Decay):
    """From 1 to ``final`` on a straight line."""

    def _shape(self, progress: float) -> float:
        return 1 + (self.final - 1) * progress


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_Decay):
    """From 1 to ``final`` on half a cosine (arXiv 1608.03983, without restarts)."""

    def _shape(self, progress: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def clip_grad_norm(params: Iterable[Tensor], max_norm: float = math.inf) -> Tensor:
    """Scales gradients so that their joint 2-norm is at most ``max_norm``; the norm before, over all ranks.

    Plain and sharded parameters may be mixed, each plain one counted once. The result stays on the device: a NaN or
    infinity is for the caller to look at, before anything steps.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0 (infinity measures without clipping), got {max_norm}")
    params = [p for p in params if p.grad is not None]
    sharded = [p for p in params if isinstance(p.grad, DTensor)]
    plain = [p for p in params if not isinstance(p.grad, DTensor)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in (sharded, plain)]
    total = torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
    if max_norm < math.inf:
        for group in (sharded, plain):
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def _groups(params: Iterable[Tensor], group_of: Callable[[Tensor], dict[str, float]]) -> list[dict[str, Any]]:
    """Parameter groups of equal hyper-parameters, the largest rate and decay first: the rate that is logged."""
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    for p in params:
        options = group_of(p)
        groups.setdefault(tuple(options.values()), {"params": [], **options})["params"].append(p)
    return [groups[key] for key in sorted(groups, reverse=True)]


def _trainable(named_params: NamedParams) -> dict[Tensor, str]:
    """Parameter -> name of those that require a gradient."""
    names = {p: name for name, p in dict(named_params).items() if p.requires_grad}
    if not names:
        raise ValueError("named_params holds no parameter that requires a gradient")
    if wrong := [f"{name} ({p.dtype})" for p, name in names.items() if p.dtype != torch.float32]:
        raise ValueError(
            f"parameters must be float32 in training (compute in bfloat16 by param_dtype), got {wrong[:5]}"
        )
    return names


def _check_rates(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
