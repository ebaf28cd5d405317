"""Command-line flags for a recipe, generated from its types and parsed by tyro."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_args

from untwine.config.schema import ConfigError, chosen, convert, entries_of, is_union, kinds_of, plain, type_name

_IS_LIST = "[]"


def apply_flags(
    schema: type, data: Mapping[str, Any], args: Sequence[str], *, prog: str | None = None
) -> dict[str, Any]:
    """The resolved recipe with values changed by flags such as ``--model.hidden-size 128``.

    The recipe chooses the kinds; flags change values, and may supply required values that the recipe leaves out.
    Members of a list of choices are addressed by position (``--terms.0.weight 0.5``). ``--help`` and wrong flags
    print and exit as tyro does.

    Raises:
        ConfigError: where ``data`` does not fit ``schema``.
    """
    import tyro

    return _collect(tyro.cli(_schema_flags(schema, data, "recipe"), prog=prog, args=list(args)))


def _schema_flags(schema: type, data: Any, where: str, fixed: Mapping[str, Any] | None = None) -> type:
    """A nested dataclass for tyro with the current values as defaults; ``fixed`` entries are no flags."""
    told = _help(schema)
    entries = {
        name: (*_flag(option.annotation, raw, f"{where}.{name}"), told.get(name))
        for name, option, raw in entries_of(schema, data, where)
    }
    return _flag_class(entries, fixed or {}, (schema.__doc__ or "").partition("\n")[0])


def _flag(annotation: Any, raw: Any, where: str) -> tuple[Any, Any]:
    """(annotation for tyro or None where a flag is impossible, default) of one option."""
    inner = _structured(annotation)
    if inner is None:
        return annotation, raw if raw is MISSING else convert(annotation, raw, where)
    if raw is MISSING:
        raise ConfigError(f"{where}: missing; give a value of type {type_name(annotation)}")
    raw = plain(raw)
    if raw is None:
        return None, convert(annotation, None, where)
    if kinds := kinds_of(inner):
        kind, target, options = chosen(kinds, raw, where)
        return _schema_flags(target, options, where, {"kind": kind}), MISSING
    if is_dataclass(inner):
        return _schema_flags(inner, raw, where), MISSING  # type: ignore[arg-type]
    return _container_flags(inner, raw, where), MISSING


def _container_flags(annotation: Any, raw: Any, where: str) -> type:
    """Flags of a tuple, list or dict of choices or dataclasses; its members stay those of the recipe."""
    *heads, last = get_args(annotation)
    if isinstance(raw, Mapping):
        arms, fixed = [last] * len(raw), {}
    elif isinstance(raw, list):
        arms, fixed = [*heads, last] if heads and last is not ... else [*heads, last][:1] * len(raw), {_IS_LIST: True}
        raw = {str(i): value for i, value in enumerate(raw)}
    else:
        arms, fixed = [], {}
    if len(arms) != len(raw):
        raise ConfigError(f"{where}: expected {type_name(annotation)}, got {raw!r}")
    members = {n: (*_flag(arm, value, f"{where}.{n}"), None) for arm, (n, value) in zip(arms, raw.items())}
    return _flag_class(members, fixed)


def _flag_class(entries: Mapping[str, tuple[Any, Any, str | None]], fixed: Mapping[str, Any], doc: str = "") -> type:
    """A dataclass with one field for each of ``entries``: name -> (annotation, value, help)."""
    import tyro

    flags = []
    for i, (name, (annotation, value, told)) in enumerate(entries.items()):
        if annotation is not None:
            marked = Annotated[annotation, tyro.conf.arg(name=name, help=told)]
            default: dict[str, Any] = {} if value is MISSING else {"default_factory": lambda value=value: value}
            flags.append((f"flag{i}", marked, field(**default, metadata={"name": name})))
    fixed = {**fixed, **{name: value for name, (annotation, value, _) in entries.items() if annotation is None}}
    return make_dataclass("Flags", flags, namespace={"__doc__": doc, "fixed": fixed}, kw_only=True)


def _structured(annotation: Any) -> Any:
    """The part that flags descend into: a choice, a dataclass, or a container of these; None for a plain value."""
    if kinds_of(annotation) or is_dataclass(annotation):
        return annotation
    inner = next((found for a in get_args(annotation) if (found := _structured(a)) is not None), None)
    return inner if inner is None or is_union(annotation) else annotation


def _help(schema: type) -> dict[str, str | None]:
    """The docstrings of attributes, and the Args sections of class docstrings."""
    from docstring_parser import parse_from_object

    told = {}
    for cls in [c for c in reversed(schema.__mro__) if is_dataclass(c)] or [schema]:
        with suppress(OSError, TypeError):  # no source to read
            told |= {p.arg_name: p.description for p in parse_from_object(cls).params}
    return told


def _collect(flags: Any) -> Any:
    """The plain data behind parsed flags."""
    values = {f.metadata["name"]: getattr(flags, f.name) for f in fields(flags)}
    values = {**flags.fixed, **{k: _collect(v) if hasattr(v, "fixed") else plain(v) for k, v in values.items()}}
    if values.pop(_IS_LIST, False):
        return [values[name] for name in sorted(values, key=int)]
    return values
