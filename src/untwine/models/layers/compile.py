"""Regional compilation: one graph per role of a repeated block, whatever the batch size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked


def compile_blocks(model: nn.Module, **options: Any) -> list[nn.Module]:
    """Compiles every module whose class is named in ``model._repeated_blocks``, in place, as full graphs.

    The batch dimension is opaque to the compiler, so guidance (2B), single samples and B share one graph. Without
    gradients a block is always handed its modulation: a refreshed and a reused step then run the same graph. Undone by
    :func:`decompile_blocks`.

    Args:
        model: a backbone over blocks ``(x, condition, context, modulation=None)`` with a method ``modulation``.
        options: passed to ``torch.compile``; ``fullgraph`` is True unless given.

    Returns:
        The compiled blocks.

    Raises:
        ValueError: if no module of the named classes is found.
    """
    blocks = _repeated(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no block to compile; name its block classes in `_repeated_blocks`, "
            f"got {getattr(model, '_repeated_blocks', None)!r}"
        )
    options = {"fullgraph": True, **_room(), **options}
    for block in blocks:
        block._compiled_call_impl = _entry(block, torch.compile(block._call_impl, **options))
    return blocks


def decompile_blocks(model: nn.Module) -> None:
    """Runs the repeated blocks eagerly again."""
    for block in _repeated(model):
        block._compiled_call_impl = None


def _room() -> dict[str, int]:
    """All models of a process share the graphs of a block class, and eight is the default limit: two models' worth."""
    return {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}


def _repeated(model: nn.Module) -> list[nn.Module]:
    names = set(getattr(model, "_repeated_blocks", None) or ())
    # The base classes count: fully_shard gives a module a subclass of its own class.
    return [module for module in model.modules() if names.intersection(c.__name__ for c in type(module).__mro__)]


def _entry(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a compiled block, with its inputs brought into the form that the graphs are specialised to."""

    def call(x: Tensor, condition: Tensor, context: Any, modulation: Tensor | None = None) -> Any:
        if not torch.is_grad_enabled():
            given: Tensor = block.modulation(condition) if modulation is None else modulation  # type: ignore[operator]
            # A graph is bound to which inputs are views of others; detached, none is.
            x, condition, modulation = x.detach(), condition.detach(), given.detach()
        for value in (x, condition, modulation):
            if value is not None:
                mark_unbacked(value, 0, shape_id="batch")
        return compiled(x, condition, context, modulation)

    return call
