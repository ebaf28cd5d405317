"""What attaches to a model for sampling and leaves no trace: the wrapping of sites, and what hears the steps.

An attached object is found by ``model.attached``. The sampling driver calls its :meth:`~Attachment.before_step` before
every network call, and :meth:`~Attachment.reset` before and after every generation. Outside of a generation an attached
model computes what it always did.

A whole block may be compiled before something attaches to it; inside a compiled block nothing can be wrapped.
A foreign module may return a tuple, as joint attention does; attachments see its tensors joined along the tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn

from untwine.contracts import StepInfo
from untwine.registry import did_you_mean


class Attachment(ABC):
    """Stands in for the forward of the modules behind some sites; a context manager whose exit restores the model."""

    model: Any = None
    at: StepInfo | None = None
    """the evaluation under way; None outside of a generation"""
    names: tuple[str, ...] = ()
    """guidance branches stacked along the batch of the call under way"""

    @abstractmethod
    def claim(self, model: Any) -> Iterable[str]:
        """The sites to stand in for; raises ValueError where nothing matches."""

    @abstractmethod
    def call(
        self, site: str, at: StepInfo, forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """What ``site`` hands on at an evaluation of the network; ``forward`` is the module's own."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What it did since it was attached."""

    def before_step(self, at: StepInfo, names: Sequence[str]) -> None:
        """Hears which evaluation the next network call belongs to, and which branches it stacks."""
        now = self.at
        if now is not None and (at.num_steps != now.num_steps or (at.step, at.stage) < (now.step, now.stage)):
            self.reset()  # a driver that never resets: steps only grow within one generation
        self.at, self.names = at, tuple(names)

    def reset(self) -> None:
        """Forgets the generation: nothing of it reaches the next one."""
        self.at, self.names = None, ()

    def attach(self, model: Any) -> Self:
        """Puts this on ``model`` and returns it.

        Raises:
            ValueError: when attached already, for a site that matches nothing, that another attachment has claimed, or
                that lies inside a compiled module.
        """
        if self.model is not None:
            raise ValueError(f"this {type(self).__name__} is attached already; detach it first")
        sites = tuple(dict.fromkeys(self.claim(model)))
        _check_free(model, sites)
        self.model = model
        self._wrapped = [_Wrapped(self, site, model.get_submodule(site)) for site in sites]
        for wrapped in self._wrapped:
            setattr(wrapped.module, wrapped.entry, wrapped)
        model.attached = [*getattr(model, "attached", ()), self]
        return self

    def detach(self) -> None:
        """Takes it off; the model is what it was before. Does nothing when it is not attached."""
        if self.model is None:
            return
        self.reset()
        for wrapped in self._wrapped:
            wrapped.restore()
        self.model.attached = [other for other in self.model.attached if other is not self]
        if not self.model.attached:
            del self.model.attached
        self.model = None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that this stands in for; empty before :meth:`attach`."""
        return tuple(wrapped.site for wrapped in self._wrapped) if self.model is not None else ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


class _Wrapped:
    """The forward of a module with an attachment in front; deep copies of the model get their own."""

    def __init__(self, attachment: Attachment, site: str, module: nn.Module) -> None:
        self.attachment, self.site, self.module = attachment, site, module
        # A module that is compiled in place is entered through its compiled call, and stays one graph behind it.
        self.entry = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        self.had = module.__dict__.get(self.entry)
        self.forward = getattr(module, self.entry)
        self.sizes: dict[tuple[str, ...], list[int | None]] = {}
        """branches of a call -> tokens of each part of a tuple"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self.site} cannot be compiled while attached to; compile, then attach to blocks")
        at = self.attachment.at
        if at is None:
            return self.forward(*args, **kwargs)
        names = self.attachment.names
        out = self.attachment.call(self.site, at, self._joined, args, kwargs)
        return out if names not in self.sizes else self._parted(out, self.sizes[names])

    def _joined(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output as one tensor (B, N, D)."""
        out = self.forward(*args, **kwargs)
        if isinstance(out, Tensor):
            return out
        self.sizes[self.attachment.names] = [None if part is None else part.shape[1] for part in out]
        return torch.cat([part for part in out if part is not None], 1)

    def _parted(self, out: Tensor, sizes: list[int | None]) -> tuple[Tensor | None, ...]:
        parts = iter(out.split([size for size in sizes if size is not None], 1))
        return tuple(None if size is None else next(parts) for size in sizes)

    def restore(self) -> None:
        if self.module.__dict__.get(self.entry) is not self:
            return  # a deep copy, which drops the compiled call
        if self.had is None:
            delattr(self.module, self.entry)
        else:
            setattr(self.module, self.entry, self.had)


def match_sites(model: Any, patterns: Iterable[str], *, words: Sequence[str] = ()) -> tuple[str, ...]:
    """The sites of ``model`` that match, in its own order; ``*`` stands for one name of the path (``blocks.*.attn``).

    Args:
        words: what the caller takes beside patterns, for the error message.

    Raises:
        ValueError: for a pattern that matches no site.
    """
    known = list(model.sites())
    found = {pattern: [site for site in known if matches(site, pattern)] for pattern in patterns}
    for pattern, matched in found.items():
        if not matched:
            hint = did_you_mean(pattern, [*words, *known])
            raise ValueError(f"sites: {pattern!r} matches no site of {type(model).__name__}{hint}")
    chosen = {site for matched in found.values() for site in matched}
    return tuple(site for site in known if site in chosen)


def matches(site: str, pattern: str) -> bool:
    """Whether a site is of a pattern; ``*`` stands for one name of the path."""
    names, globs = site.split("."), pattern.split(".")
    return len(names) == len(globs) and all(map(fnmatchcase, names, globs))


def overlap(first: Iterable[str], second: Iterable[str]) -> tuple[str, str] | None:
    """A site of each that are the same, or one inside the other; None when there are none."""
    second = list(second)
    for a in first:
        for b in second:
            if a == b or a.startswith(f"{b}.") or b.startswith(f"{a}."):
                return a, b
    return None


def _check_free(model: Any, sites: Sequence[str]) -> None:
    if not sites:
        raise ValueError("sites must name at least one site")
    for other in getattr(model, "attached", ()):
        if clash := overlap(sites, getattr(other, "sites", ())):
            owner = type(other).__name__
            raise ValueError(f"site {clash[0]}: an attached {owner} has claimed {clash[1]}; detach it first")
    for site in sites:
        names = site.split(".")
        for end in range(1, len(names)):
            outer = ".".join(names[:end])
            if model.get_submodule(outer)._compiled_call_impl is not None:
                raise ValueError(f"site {site} lies inside {outer}, which is compiled; attach to whole blocks instead")
