"""Recipe files: YAML, read strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from untwine.config.schema import FLOAT, INT, ConfigError

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 32
_SCALARS = {"null": "~|null|Null|NULL|", "bool": "true|True|TRUE|false|False|FALSE", "int": INT, "float": FLOAT}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file: safe types only, YAML 1.2 scalars (``3e-4`` is a number, ``no`` a string).

    ``base: other.yaml``, relative to the file, merges it over another one (one level). A choice of another kind
    replaces the base's whole choice.

    Raises:
        ConfigError: naming file and line, for bad syntax, duplicate keys, and files too large, too deep, or with
            aliases that expand too far.
    """
    path = Path(path)
    data = _read(path)
    if "base" not in data:
        return data
    base_path = path.parent / str(data.pop("base"))
    base = _read(base_path)
    if "base" in base:
        raise ConfigError(f"{base_path}: a base file may not have a base itself; merge the two files")
    return _merge(base, data)


class _Loader(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2 instead of those of 1.1."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own table, filled below)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


for _tag, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _read(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {size} bytes; a recipe has at most {MAX_FILE_BYTES}")
        loader = _Loader(path.read_bytes())
        node = loader.get_single_node()
        _check(node, path)
        data = loader.construct_document(node) if node else None
    except RecursionError as error:
        raise ConfigError(f"{path}: more than {MAX_DEPTH} levels") from error
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected options as 'name: value' lines, got {type(data).__name__}")
    return data


def _check(root: yaml.Node | None, path: Path) -> None:
    """Walks the document with its aliases expanded; stops early, before any Python value exists."""
    stack, count = [(root, 0)] if root else [], 0
    while stack:
        node, depth = stack.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            at = f"{path}: line {node.start_mark.line + 1}"
            raise ConfigError(f"{at}: more than {MAX_NODES} values or {MAX_DEPTH} levels (aliases count in full)")
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, path)
            stack += [(value, depth + 1) for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            stack += [(value, depth + 1) for value in node.value]


def _check_keys(node: yaml.MappingNode, path: Path) -> None:
    known: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}: line {line}: an option name must be a word")
        if key.value in known:
            raise ConfigError(f"{path}: line {line}: {key.value!r} is given twice (first on line {known[key.value]})")
        known[key.value] = line


def _merge(base: Any, data: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(data, dict):
        return data
    if "kind" in data and data["kind"] != base.get("kind"):
        return data
    return base | {k: _merge(base.get(k), v) for k, v in data.items()}
