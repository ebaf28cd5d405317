"""Regional compilation: one graph per role of a repeated block, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked


def compile_blocks(model: nn.Module, **options: Any) -> list[nn.Module]:
    """Compiles every module whose class is named in ``model._repeated_blocks``, in place, as full graphs.

    The batch dimension is opaque to the compiler, so guidance (2B), single samples and B share one graph. Without
    gradients a block that offers ``modulation`` is always handed one: a refreshed and a reused step then run the same
    graph. Undone by :func:`decompile_blocks`.

    Args:
        model: a backbone.
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
    options = {"fullgraph": True, **options}
    for block in blocks:
        block._compiled_call_impl = _entry(block, torch.compile(block._call_impl, **options))
    return blocks


def decompile_blocks(model: nn.Module) -> None:
    """Runs the repeated blocks eagerly again."""
    for block in _repeated(model):
        block._compiled_call_impl = None


def _repeated(model: nn.Module) -> list[nn.Module]:
    names = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def _entry(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a compiled block, with its inputs brought into the form that the graphs are specialised to."""
    modulate = getattr(block, "modulation", None)

    def call(x: Tensor, condition: Tensor, context: Any, modulation: Tensor | None = None) -> Any:
        if modulation is None and modulate is not None and not torch.is_grad_enabled():
            modulation = modulate(condition)
        for value in (x, condition, modulation):
            if value is not None:
                mark_unbacked(value, 0, shape_id="batch")
        return compiled(x, condition, context, modulation)

    return call
