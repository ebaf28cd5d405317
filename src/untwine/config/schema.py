"""Typed values from plain data, and back: dataclasses, annotated signatures, and choices from registries."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from untwine.registry import Registry, did_you_mean

T = TypeVar("T")
INT = r"[-+]?[0-9]+(_[0-9]+)*"
FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message starts with the full path of the option."""


@dataclass(frozen=True)
class Component(Generic[T]):
    """One member of a registry with its options, not built yet."""

    registry: str
    """``"module:attribute"`` of the registry"""
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> type[T]:
        """The class that :meth:`build` instantiates."""
        return _registry(self.registry)[self.kind]

    def build(self, **runtime: Any) -> T:
        """An instance; nested components are built first, and ``runtime`` adds to the options or replaces them."""
        target = self.target
        options = _options(target, self.options, self.kind, given=runtime)
        return target(**{name: _build(value) for name, value in options.items()}, **runtime)

    def replace(self, **options: Any) -> Component[T]:
        """A copy with some options changed and all of them checked."""
        return Component(self.registry, self.kind, _options(self.target, {**self.options, **options}, self.kind))

    def to_dict(self) -> dict[str, Any]:
        """``{"kind": ..., option: value}`` with every default filled in."""
        return {"kind": self.kind, **plain(_options(self.target, self.options, self.kind))}


def from_dict(schema: type[T], data: Mapping[str, Any], where: str = "recipe") -> T:
    """An instance of ``schema`` from plain data, strictly checked, with choices as :class:`Component` values.

    Raises:
        ConfigError: unknown option (with the closest known one), missing option, or a value of another type.
    """
    options = {
        name: value if _holds(_schema(schema)[name].annotation) else _build(value)
        for name, value in _options(schema, data, where).items()
    }
    try:
        return schema(**options)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def to_dict(instance: Any) -> dict[str, Any]:
    """The plain data (YAML and JSON types) of a dataclass or component; :func:`from_dict` reads it back."""
    return plain(instance)


@dataclass(frozen=True)
class Option:
    """One parameter of a schema."""

    annotation: Any
    default: Any = MISSING


def _schema(schema: type) -> dict[str, Option]:
    """The options of a dataclass or class, in order."""
    if is_dataclass(schema):
        hints = get_type_hints(schema)
        found = {f.name: Option(hints[f.name], _default(f)) for f in fields(schema) if f.init}
    else:
        init = schema.__init__
        hints = get_type_hints(init)
        found = {
            name: Option(hints.get(name), MISSING if p.default is p.empty else p.default)
            for name, p in list(inspect.signature(init).parameters.items())[1:]
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
    return {name: option for name, option in found.items() if _configurable(option.annotation)}


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _registry(reference: str) -> Registry:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def kinds_of(annotation: Any) -> str | None:
    """The registry reference of a choice, else None."""
    cls = get_args(annotation)[0] if get_origin(annotation) is Component else annotation
    return getattr(cls, "kinds", None) if isinstance(cls, type) else None


def _holds(annotation: Any) -> bool:
    """Whether the annotation mentions Component: the value is kept as it is, not built."""
    return get_origin(annotation) is Component or any(map(_holds, get_args(annotation)))


def is_union(annotation: Any) -> bool:
    """Whether the annotation is ``A | B`` or ``Optional[A]``."""
    return get_origin(annotation) in (Union, types.UnionType)


def _configurable(annotation: Any) -> bool:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType, tuple, list, dict, Sequence, Mapping):
        return all(_configurable(a) for a in args if a is not ...)
    scalar = annotation in (bool, int, float, str, Path, type(None))
    return scalar or origin is Literal or is_dataclass(annotation) or kinds_of(annotation) is not None


def entries_of(schema: type, data: Any, where: str, given: Collection[str] = ()) -> Iterator[tuple[str, Option, Any]]:
    """Each option with its raw value: from ``data``, else the default, else MISSING."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected options of {schema.__name__} as a mapping, got {data!r}")
    options = _schema(schema)
    for name in data:
        if name not in options and name not in given:
            raise ConfigError(f"{where}.{name}: unknown option{did_you_mean(str(name), options)}")
    for name, option in options.items():
        if name not in given:
            yield name, option, data.get(name, option.default)


def _options(schema: type, data: Any, where: str, given: Collection[str] = ()) -> dict[str, Any]:
    """All options, converted; those in ``given`` are left to the caller."""
    values = {}
    for name, option, raw in entries_of(schema, data, where, given):
        if raw is MISSING:
            raise ConfigError(f"{where}.{name}: missing; give a value of type {type_name(option.annotation)}")
        values[name] = convert(option.annotation, raw, f"{where}.{name}")
    return values


def convert(annotation: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type; int is accepted for float, a list for a tuple, a string for a Path."""
    origin, args = get_origin(annotation), get_args(annotation)
    if kinds := kinds_of(annotation):
        kind, target, options = chosen(kinds, value, where)
        return Component(kinds, kind, _options(target, options, where))
    if is_union(annotation):
        return _convert_union(annotation, value, where)
    if origin in (tuple, list, Sequence):
        return _convert_sequence(annotation, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise _wrong(annotation, value, where)
        return {k: convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if is_dataclass(annotation):
        return value if isinstance(value, annotation) else from_dict(annotation, value, where)  # type: ignore[arg-type]
    if origin is Literal and any(type(value) is type(a) and value == a for a in args):
        return value
    if annotation is Path and isinstance(value, str | Path):
        return Path(value)
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is annotation and value == value:
        return value
    raise _wrong(annotation, value, where)


def chosen(kinds: str, value: Any, where: str) -> tuple[str, type, dict[str, Any]]:
    """(kind, class, raw options) of a choice given as a name, a mapping, a component or a dataclass instance."""
    if isinstance(value, Component) or (is_dataclass(value) and hasattr(value, "kinds")):
        value = plain(value)
    options = {"kind": value} if isinstance(value, str) else value
    known = _registry(kinds)
    if not isinstance(options, Mapping) or not isinstance(options.get("kind"), str):
        raise ConfigError(
            f"{where}: expected a {known.noun} as 'name' or {{kind: name, ...}}, got {value!r}"
            f" (known: {', '.join(sorted(known))})"
        )
    kind = options["kind"]
    if kind not in known:
        raise ConfigError(f"{where}.kind: unknown {known.noun} {kind!r}{did_you_mean(kind, known)}")
    return kind, known[kind], {k: v for k, v in options.items() if k != "kind"}


def _convert_union(annotation: Any, value: Any, where: str) -> Any:
    arms = [a for a in get_args(annotation) if a is not type(None)]
    if value is None and type(None) in get_args(annotation):
        return None
    if len(arms) == 1:
        return convert(arms[0], value, where)
    for arm in sorted(arms, key=lambda a: type(value) is not a):  # an exact type wins: 3 stays int in float | int
        with suppress(ConfigError):
            return convert(arm, value, where)
    raise _wrong(annotation, value, where)


def _convert_sequence(annotation: Any, value: Any, where: str) -> Any:
    args = get_args(annotation)
    if not isinstance(value, list | tuple):
        raise _wrong(annotation, value, where)
    if get_origin(annotation) is not tuple or args[-1] is ...:
        args = (args[0],) * len(value)
    elif len(args) != len(value):
        raise _wrong(annotation, value, where)
    items = (convert(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(args, value)))
    return list(items) if get_origin(annotation) is list else tuple(items)


def _wrong(annotation: Any, value: Any, where: str) -> ConfigError:
    hint = ""
    numbers = {a for a in (annotation, *get_args(annotation)) if a in (int, float)}
    if numbers and isinstance(value, str) and re.fullmatch(INT if numbers == {int} else f"{INT}|{FLOAT}", value):
        hint = f"; write {value} without quotes"
    elif numbers == {int} and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value)}"
    return ConfigError(f"{where}: expected {type_name(annotation)}, got {value!r}{hint}")


def type_name(annotation: Any) -> str:
    """The type as a message says it."""
    if kinds := kinds_of(annotation):
        return _registry(kinds).noun
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if is_union(annotation):
        return " or ".join(map(type_name, get_args(annotation)))
    if annotation is type(None):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def plain(value: Any) -> Any:
    """Values as YAML types; a registered dataclass instance carries its kind."""
    if isinstance(value, Component):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        reference = getattr(value, "kinds", None)
        kind = {"kind": _registry(reference).name_of(type(value))} if reference else {}
        return {**kind, **{name: plain(getattr(value, name)) for name in _schema(type(value))}}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"cannot write a {type(value).__name__} into a configuration: {value!r}")


def _build(value: Any) -> Any:
    if isinstance(value, Component):
        return value.build()
    if isinstance(value, list | tuple):
        return type(value)(map(_build, value))
    return {k: _build(v) for k, v in value.items()} if isinstance(value, dict) else value
