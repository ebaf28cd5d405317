"""Strict configuration: YAML recipes -> typed values -> components, with command-line flags generated from the types.

A *schema* is a dataclass, or the annotated ``__init__`` of any class. Its options are the parameters annotated with
bool, int, float, str, Path, None, ``Literal``, a union of these, a tuple, list or string-keyed dict, another dataclass,
or a *choice*: a class with ``kinds: ClassVar[str] = "module:registry"``. Parameters of any other type are given at run
time, to :meth:`Component.build`. A choice is written ``{kind: name, option: value}`` or just ``name``, and is held as
a :class:`Component` until it is built: annotate it with ``Component[Base]`` in a recipe, which holds it, and with
``Base`` in the ``__init__`` that uses it.
"""

from untwine.config.flags import apply_flags
from untwine.config.recipes import load_yaml
from untwine.config.schema import Component, ConfigError, from_dict, to_dict

__all__ = ["Component", "ConfigError", "apply_flags", "from_dict", "load_yaml", "to_dict"]
