"""Literal tables ``name -> "module:Class"`` that resolve on access, so that listing names imports nothing."""

from __future__ import annotations

import difflib
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module, metadata
from typing import Any


class Registry(Mapping[str, Any]):
    """The named implementations of one extension point.

    Listing names imports nothing; ``registry[name]`` imports the module.
    An outside package adds its own with :meth:`register`, from a module that it names in the entry-point group
    ``untwine.plugins``: those are imported when a name is looked up that the table lacks. The names of ``others`` count
    as its own, those registered there later included.

    Raises:
        ValueError: on access to an unknown name; the message lists the known ones and the closest match.
    """

    def __init__(self, noun: str, table: Mapping[str, str], *, others: tuple[Registry, ...] = ()) -> None:
        self.noun = noun
        self._table: MutableMapping[str, str] = ChainMap(dict(table), *(other._table for other in others))

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise ValueError(f"unknown {self.noun} {name!r}{did_you_mean(name, self._table)}")
        module, _, attribute = self._table[name].partition(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: object) -> bool:
        if name not in self._table:
            _load_plugins()
        return name in self._table

    def register(self, name: str, target: str) -> None:
        """Adds ``name`` with a ``"module:Class"`` target; an existing name is refused."""
        if name in self._table:
            raise ValueError(f"{self.noun} {name!r} is already registered as {self._table[name]}; choose another name")
        self._table[name] = target

    def name_of(self, cls: type) -> str:
        """The name under which a class is registered."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        for name, known in self._table.items():
            if known == target:
                return name
        raise ValueError(f"{cls.__qualname__} is not a registered {self.noun}; add {target!r} with register()")


_plugins_loaded = False


def _load_plugins() -> None:
    """Imports the modules that installed packages name in ``untwine.plugins``, once."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for entry_point in metadata.entry_points(group="untwine.plugins"):
            entry_point.load()


def did_you_mean(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """``; did you mean 'x'?`` when something close is known, and always the list of what is known."""
    close = difflib.get_close_matches(word, list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(sorted(known)) or 'none'})"
