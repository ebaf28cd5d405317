"""Strict configuration: YAML recipes -> typed values -> components, with command-line flags generated from the types.

A *schema* is a dataclass, or the annotated ``__init__`` of any class. Its options are the parameters annotated with
bool, int, float, str, Path, None, ``Literal``, a union of these, a tuple, list or string-keyed dict, another dataclass,
or a *choice*: a class with ``kinds: ClassVar[str] = "module:registry"``. Parameters of any other type are given at run
time, to :meth:`Component.build`. A choice is written ``{kind: name, option: value}`` or just ``name``, and is held as a
:class:`Component` until it is built; annotate it with ``Component[Base]`` where it is held, with ``Base`` where it is used.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from untwine.registry import Registry, did_you_mean

T = TypeVar("T")
MAX_FILE_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 32


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
        return {"kind": self.kind, **_plain(_options(self.target, self.options, self.kind))}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file: safe types only, YAML 1.2 scalars (``3e-4`` is a number, ``no`` a string).

    ``base: other.yaml`` merges the file over another one (one level). A choice of another kind replaces the base's.

    Raises:
        ConfigError: naming file and line: syntax, duplicate keys, a file that is too large, too deep or expands too far.
    """
    path = Path(path)
    data = _read_yaml(path)
    if "base" not in data:
        return data
    base_path = path.parent / str(data.pop("base"))
    base = _read_yaml(base_path)
    if "base" in base:
        raise ConfigError(f"{base_path}: a base file may not have a base itself; merge the two files")
    return _merge(base, data)


def from_dict(schema: type[T], data: Mapping[str, Any], where: str = "recipe") -> T:
    """An instance of ``schema`` from plain data, strictly checked, with choices as :class:`Component` values.

    Raises:
        ConfigError: unknown option (with the closest known one), missing option, or a value of another type.
    """
    options = _options(schema, data, where)
    if not is_dataclass(schema):
        options = {name: _build(value) for name, value in options.items()}
    try:
        return schema(**options)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def to_dict(instance: Any) -> dict[str, Any]:
    """The plain data (YAML and JSON types) of a dataclass or component; :func:`from_dict` reads it back."""
    return _plain(instance)


def apply_flags(
    schema: type, data: Mapping[str, Any], args: Sequence[str], *, prog: str | None = None
) -> dict[str, Any]:
    """The resolved recipe with values changed by flags such as ``--model.hidden-size 128``.

    The recipe chooses the kinds; flags change values, and may supply options that the recipe leaves out. Members of a
    list of choices are addressed by position (``--terms.0.weight 0.5``). ``--help`` and errors exit as tyro does.
    """
    import tyro

    return _collect(tyro.cli(_flags(schema, data, "recipe"), prog=prog, args=list(args)))


# Schemas


@dataclass(frozen=True)
class _Option:
    annotation: Any
    default: Any = MISSING


def _schema(schema: type) -> dict[str, _Option]:
    """The options of a dataclass or class, in order."""
    if is_dataclass(schema):
        hints = get_type_hints(schema)
        found = {f.name: _Option(hints[f.name], _default(f)) for f in fields(schema) if f.init}
    else:
        init = schema.__init__
        hints = get_type_hints(init)
        found = {
            name: _Option(hints.get(name), MISSING if p.default is p.empty else p.default)
            for name, p in list(inspect.signature(init).parameters.items())[1:]
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
    return {name: option for name, option in found.items() if _configurable(option.annotation)}


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _registry(reference: str) -> Registry:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def _kinds(annotation: Any) -> str | None:
    """The registry reference of a choice, else None."""
    cls = get_args(annotation)[0] if get_origin(annotation) is Component else annotation
    return getattr(cls, "kinds", None) if isinstance(cls, type) else None


def _configurable(annotation: Any) -> bool:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType, tuple, list, dict, Sequence, Mapping):
        return all(_configurable(a) for a in args if a is not ...)
    scalar = annotation in (bool, int, float, str, Path, type(None))
    return scalar or origin is Literal or is_dataclass(annotation) or _kinds(annotation) is not None


def _entries(schema: type, data: Any, where: str, given: Collection[str] = ()) -> Iterator[tuple[str, _Option, Any]]:
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
    for name, option, raw in _entries(schema, data, where, given):
        if raw is MISSING:
            raise ConfigError(f"{where}.{name}: missing; give a value of type {_name(option.annotation)}")
        values[name] = _convert(option.annotation, raw, f"{where}.{name}")
    return values


# Values


def _convert(annotation: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if kinds := _kinds(annotation):
        kind, target, options = _chosen(kinds, value, where)
        return Component(kinds, kind, _options(target, options, where))
    if origin in (Union, types.UnionType):
        return _convert_union(annotation, args, value, where)
    if origin in (tuple, list, Sequence):
        return _convert_sequence(annotation, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise _wrong(annotation, value, where)
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
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


def _chosen(kinds: str, value: Any, where: str) -> tuple[str, type, dict[str, Any]]:
    """(kind, class, raw options) of a choice given as a name, a mapping, a component or a dataclass instance."""
    if isinstance(value, Component) or (is_dataclass(value) and hasattr(value, "kinds")):
        value = _plain(value)
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


def _convert_union(annotation: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    for arm in sorted(args, key=lambda a: type(value) is not a):  # an exact type wins: 3 stays int in float | int
        try:
            return _convert(arm, value, where)
        except ConfigError as error:
            failure = error
    meant = [a for a in args if a is not type(None)]
    if len(meant) == 1 and isinstance(value, Mapping | list | tuple):
        raise failure  # the only structured arm says best what is wrong inside
    raise _wrong(annotation, value, where)


def _convert_sequence(annotation: Any, value: Any, where: str) -> Any:
    args = get_args(annotation)
    if not isinstance(value, list | tuple):
        raise _wrong(annotation, value, where)
    if get_origin(annotation) is not tuple or args[-1] is ...:
        args = (args[0],) * len(value)
    elif len(args) != len(value):
        raise _wrong(annotation, value, where)
    items = (_convert(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(args, value)))
    return list(items) if get_origin(annotation) is list else tuple(items)


def _wrong(annotation: Any, value: Any, where: str) -> ConfigError:
    hint = ""
    numbers = {a for a in (annotation, *get_args(annotation)) if a in (int, float)}
    if numbers and isinstance(value, str) and re.fullmatch(_INT if numbers == {int} else f"{_INT}|{_FLOAT}", value):
        hint = f"; write {value} without quotes"
    elif numbers == {int} and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value)}"
    return ConfigError(f"{where}: expected {_name(annotation)}, got {value!r}{hint}")


def _name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(_name, get_args(annotation)))
    if annotation is type(None):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _plain(value: Any) -> Any:
    """Values as YAML types; a registered dataclass instance carries its kind."""
    if isinstance(value, Component):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        reference = getattr(value, "kinds", None)
        kind = {"kind": _registry(reference).name_of(type(value))} if reference else {}
        return {**kind, **{name: _plain(getattr(value, name)) for name in _schema(type(value))}}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
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


# YAML

_INT = r"[-+]?[0-9]+(_[0-9]+)*"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_SCALARS = {"null": "~|null|Null|NULL|", "bool": "true|True|TRUE|false|False|FALSE", "int": _INT, "float": _FLOAT}


class _Loader(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2 instead of those of 1.1."""

    yaml_implicit_resolvers: dict[str | None, Any] = {}  # noqa: RUF012  (PyYAML's name; filled below)


for _tag, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes; a recipe has at most {MAX_FILE_BYTES}")
        loader = _Loader(path.read_bytes())
        node = loader.get_single_node()
        _check_nodes(node, path)
        data = loader.construct_document(node) if node else None
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected options as 'name: value' lines, got {type(data).__name__}")
    return data


def _check_nodes(root: yaml.Node | None, path: Path) -> None:
    """Walks the document with aliases expanded, and stops early, before Python values exist."""
    stack, count = [(root, 0)] if root else [], 0
    while stack:
        node, depth = stack.pop()
        count += 1
        line = f"{path}: line {node.start_mark.line + 1}"
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError(f"{line}: more than {MAX_NODES} values or {MAX_DEPTH} levels, aliases expanded")
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            known: set[str] = set()
            for key, _ in children:
                if not isinstance(key, yaml.ScalarNode) or key.value in known:
                    raise ConfigError(f"{path}: line {key.start_mark.line + 1}: {key.value!r} is given twice")
                known.add(key.value)
            children = [value for _, value in children]
        stack += [(child, depth + 1) for child in children]


def _merge(base: Any, data: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(data, dict):
        return data
    if "kind" in data and data["kind"] != base.get("kind"):
        return data
    return base | {k: _merge(base.get(k), v) for k, v in data.items()}


# Flags


def _flags(schema: type, data: Any, where: str, fixed: Mapping[str, Any] | None = None) -> type:
    """A nested dataclass for tyro with the current values as defaults; ``fixed`` entries are no flags."""
    told = _help(schema)
    entries = {
        n: (*_flag(o.annotation, raw, f"{where}.{n}"), told.get(n)) for n, o, raw in _entries(schema, data, where)
    }
    return _flag_class(entries, fixed or {}, (schema.__doc__ or "").partition("\n")[0])


def _help(schema: type) -> dict[str, str | None]:
    """The docstrings of attributes, and the Args sections of class docstrings."""
    from docstring_parser import parse_from_object

    told = {}
    for cls in [c for c in reversed(schema.__mro__) if is_dataclass(c)] or [schema]:
        with suppress(OSError, TypeError):  # no source to read
            told |= {p.arg_name: p.description for p in parse_from_object(cls).params}
    return told


def _flag_class(entries: Mapping[str, tuple[Any, Any, str | None]], fixed: Mapping[str, Any], doc: str = "") -> type:
    """``entries`` are name -> (annotation, or None where a flag is impossible; value; help)."""
    import tyro

    flags = []
    for i, (name, (annotation, value, told)) in enumerate(entries.items()):
        if annotation is not None:
            marked = Annotated[annotation, tyro.conf.arg(name=name, help=told)]
            default = {} if value is MISSING else {"default_factory": lambda value=value: value}
            flags.append((f"flag{i}", marked, field(**default, metadata={"name": name})))
    fixed = {**fixed, **{name: value for name, (annotation, value, _) in entries.items() if annotation is None}}
    return make_dataclass("Flags", flags, namespace={"__doc__": doc, "fixed": fixed}, kw_only=True)


def _flag(annotation: Any, raw: Any, where: str) -> tuple[Any, Any]:
    """(annotation for tyro, default) of one option."""
    inner = _structured(annotation)
    if inner is None:
        return annotation, raw if raw is MISSING else _convert(annotation, raw, where)
    if raw is MISSING:
        raise ConfigError(f"{where}: missing; give a value of type {_name(annotation)}")
    raw = _plain(raw)
    if raw is None:
        return None, None
    if kinds := _kinds(inner):
        kind, target, options = _chosen(kinds, raw, where)
        return _flags(target, options, where, {"kind": kind}), MISSING
    if is_dataclass(inner):
        return _flags(inner, raw, where), MISSING  # type: ignore[arg-type]
    args = get_args(inner)
    if isinstance(raw, Mapping):
        members = {name: (args[-1], value) for name, value in raw.items()}
    else:
        members = {
            str(i): (args[i] if args[-1] is not ... and i < len(args) else args[0], v) for i, v in enumerate(raw)
        }
    entries = {name: (*_flag(arm, value, f"{where}.{name}"), None) for name, (arm, value) in members.items()}
    return _flag_class(entries, {} if isinstance(raw, Mapping) else {_LIST: True}), MISSING


_LIST = "[]"


def _structured(annotation: Any) -> Any:
    """The part that flags descend into: a choice, a dataclass, or a container of these; None for a plain value."""
    if _kinds(annotation) or is_dataclass(annotation):
        return annotation
    inner = next((found for a in get_args(annotation) if (found := _structured(a)) is not None), None)
    return inner if inner is None or get_origin(annotation) in (Union, types.UnionType) else annotation


def _collect(flags: Any) -> Any:
    """The plain data behind parsed flags."""
    values = {f.metadata["name"]: getattr(flags, f.name) for f in fields(flags)}
    values = {**flags.fixed, **{k: _collect(v) if hasattr(v, "fixed") else _plain(v) for k, v in values.items()}}
    if values.pop(_LIST, False):
        return [values[name] for name in sorted(values, key=int)]
    return values
