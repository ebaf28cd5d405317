"""Processes, and one function that spreads a model over them: plain torch, changed in place, never wrapped.

Launch with ``torchrun`` (``accelerate launch`` sets the same variables); without a launcher there is one process and no
process group. Without CUDA the group is gloo, so every path here also runs on a laptop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

T = TypeVar("T")
Strategy = Literal["none", "ddp", "fsdp", "hsdp"]
TIMEOUT_SECONDS = 600
"""after which a collective that a dead process does not join fails on the others"""
DAY = 86_400
"""a time-out where processes work for hours without a word to each other; one that dies is noticed all the same"""
_DDP_LIMIT = 10**9
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)
"""over which this thread's processes speak; None = the one that training uses"""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over processes and what its blocks are traded for."""

    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """auto: none with one process; else ddp below 10^9 parameters (their training state fits one device), fsdp above"""
    checkpointing: bool = False
    """recompute each block in the backward pass instead of keeping its activations"""
    compile: bool = False
    """compile each repeated block"""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """what the forward pass computes in; parameters, gradients' reduction and optimizer state stay float32"""
    shard_size: int = 0
    """hsdp: neighbouring processes that share one copy of the weights; 0 = the processes of one machine"""


@dataclass(frozen=True)
class Distributed:
    """This process among the others; usable with and without a process group."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    owns_group: bool = False

    @classmethod
    def start(cls, device: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Distributed:
        """Joins the process group that the launcher's variables describe; alone where there are none.

        Args:
            device: ``cpu`` or ``cuda``; default: CUDA where there is any.
            timeout_seconds: after which a collective that a dead rank does not join fails on the others.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda' (the launcher picks the index), got {device!r}")
        here = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
        if here.type == "cuda":
            torch.cuda.set_device(here)
        owns = "RANK" in os.environ and not dist.is_initialized()
        if owns:
            backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        return cls(here, rank(), world_size(), local, owns)

    def set_timeout(self, seconds: float) -> None:
        """Another time-out from now on, for the collectives of training."""
        if self.world_size > 1:
            change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            change(timedelta(seconds=seconds))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def mesh(self, **sizes: int) -> DeviceMesh:
        """A device mesh with the named dimensions, by default one over all processes."""
        sizes = sizes or {"shard": self.world_size}
        return init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over processes, the same on each; ``value`` itself is left alone."""
        mean = value.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(mean)
        return mean / self.world_size

    def agree(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process: a failure of one becomes the decision of all."""
        return bool(self.agree_on(int(flag)))

    def agree_on(self, number: int) -> int:
        """The largest ``number`` of any process, on all of them; exchanged between the hosts where they can."""
        if self.world_size == 1:
            return number
        votes = torch.tensor(number, device="cpu" if self.owns_group else self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return int(votes)

    def gather(self, value: Tensor) -> Tensor:
        """(ranks, *shape): the ``value`` of every process, all of one shape, on all of them."""
        if self.world_size == 1:
            return value[None]
        parts = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.all_gather(parts, value.contiguous())
        return torch.stack(parts)

    def barrier(self) -> None:
        """Waits for every process."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the process group, if :meth:`start` joined it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def parallelize(model: nn.Module, plan: ParallelConfig, processes: Distributed) -> nn.Module:
    """Applies ``plan`` to ``model`` in place and returns it: block checkpointing, compilation, then distribution.

    Blocks are the modules whose class the model names in ``_no_split_modules``. Methods beside ``forward`` that use
    parameters are named by the class attribute ``fsdp_methods`` of the model and of its blocks. A model on the meta
    device stays there; ``to_empty`` and initialisation come after, before the first forward pass.
    Gradients are means over processes, so a loss that is a mean over the local samples gives those of one process.

    Raises:
        ValueError: for a plan that the model or the number of processes cannot follow.
    """
    strategy = resolve_strategy(plan, model, processes)
    if strategy != "none" and not dist.is_initialized():
        raise ValueError(f"strategy {strategy!r} needs a process group: launch with torchrun, or use 'auto'")
    blocks = _blocks(model)
    if plan.checkpointing:
        enable: Callable[[], None] | None = getattr(model, "enable_gradient_checkpointing", None)
        if enable is None:
            raise ValueError(
                f"checkpointing: {type(model).__name__} has no enable_gradient_checkpointing(); set it to False"
            )
        enable()
    if plan.compile:
        from untwine.models.layers.compile import compile_blocks

        compile_blocks(model)
    if strategy == "ddp":
        replicate(model, device_id=processes.device)
    elif strategy in ("fsdp", "hsdp"):
        _shard(model, blocks, plan, _shard_mesh(strategy, plan, processes))
    return model


def resolve_strategy(plan: ParallelConfig, model: nn.Module, processes: Distributed) -> Strategy:
    """The strategy that ``plan`` means for this model and these processes."""
    if plan.strategy != "auto":
        if plan.strategy == "none" and processes.world_size > 1:
            raise ValueError(f"strategy 'none' would train {processes.world_size} unrelated models; use 'auto'")
        return plan.strategy
    if processes.world_size == 1:
        return "none"
    return "ddp" if sum(p.numel() for p in model.parameters()) < _DDP_LIMIT else "fsdp"


@contextmanager
def no_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch: gradients are reduced over processes with the ``last`` one."""
    switch: Callable[[bool], None] = getattr(model, "set_requires_gradient_sync", lambda _: None)
    switch(last)
    try:
        yield
    finally:
        switch(True)


def autocast(model: nn.Module, plan: ParallelConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a model call that computes in ``plan.param_dtype``; a sharded model casts its own parameters."""
    if plan.param_dtype == "float32" or isinstance(model, FSDPModule):
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, plan.param_dtype))


def reshard(model: nn.Module) -> None:
    """Frees weights that an interrupted forward pass left gathered, so that the shards can be read and written."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _blocks(model: nn.Module) -> list[nn.Module]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if names and not blocks:
        raise ValueError(
            f"_no_split_modules of {type(model).__name__} names {sorted(names)}, but it has no such module"
        )
    return blocks


def _shard_mesh(strategy: Strategy, plan: ParallelConfig, processes: Distributed) -> DeviceMesh:
    if strategy == "fsdp":
        return processes.mesh()
    size = plan.shard_size or processes.local_world_size
    if processes.world_size % size:
        raise ValueError(f"shard_size must divide the {processes.world_size} processes, got {size}")
    return processes.mesh(replicate=processes.world_size // size, shard=size)


def _shard(model: nn.Module, blocks: list[nn.Module], plan: ParallelConfig, mesh: DeviceMesh) -> None:
    # cast_forward_inputs would round t and the RoPE tables to bfloat16 at the door of each block.
    policy = MixedPrecisionPolicy(
        param_dtype=None if plan.param_dtype == "float32" else getattr(torch, plan.param_dtype),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for module in [*blocks, model]:
        # The root too: weights that stay gathered after an evaluation would hide what is then written to the shards.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for method in getattr(module, "fsdp_methods", ()):
            register_fsdp_forward_method(module, method)


def rank() -> int:
    """Of this process in the group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group() -> dist.ProcessGroup | None:
    """Over which :func:`together` exchanges; None = the group of everything else."""
    return _group.get()


@contextmanager
def speaking_over(other: dist.ProcessGroup | None) -> Iterator[None]:
    """Inside, and in this thread only, :func:`together` exchanges over a group that no other thread uses."""
    token = _group.set(other)
    try:
        yield
    finally:
        _group.reset(token)


def together(fn: Callable[[], T]) -> list[T]:
    """Runs ``fn`` on every process: all results by rank, or on every process the error of the first one that failed."""
    if not dist.is_initialized():
        return [fn()]
    result, error = None, None
    try:
        result = fn()
    except Exception as caught:
        error = caught
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, (result, error), group=group())
    for _, error in gathered:
        if error is not None:
            raise error
    return [result for result, _ in gathered]


def on_main(fn: Callable[[], T]) -> T:
    """Runs ``fn`` on rank 0; every process gets its result or its error."""
    return together(lambda: fn() if rank() == 0 else None)[0]  # type: ignore[return-value]
