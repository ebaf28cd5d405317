"""The extensions that CONTRIBUTING shows in full are run as shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from untwine.config import from_dict
from untwine.diffusion import SOLVERS
from untwine.training.objectives import TERMS

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The files of the page, importable; what they register is forgotten afterwards."""
    files = {re.match(r"# (\S+)\n", code).group(1): code for code in blocks("python")}
    for name, code in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    (tmp_path / "mypackage" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    tables = [(registry, dict(registry._table)) for registry in (SOLVERS, TERMS)]
    yield files
    for registry, table in tables:
        registry._table = table
    for name in [name for name in sys.modules if name.startswith("mypackage")]:
        del sys.modules[name]


def test_examples_run_and_register(package):
    assert len(package["mypackage/ralston.py"].splitlines()) <= 40
    for name, code in package.items():
        if "test_" in name:
            exec(compile(code, name, "exec"), {"__name__": name})
    assert "ralston" in SOLVERS
    assert SOLVERS["ralston"]().__class__.__name__ == "Ralston"


def test_the_recipe_lines_are_a_recipe(package):
    import yaml

    from untwine.training.objectives.flow_matching import FlowMatching

    TERMS.register("direction", "mypackage.direction:DirectionTerm")
    options = yaml.safe_load(blocks("yaml")[0])["objective"]
    assert options.pop("kind") == "flow_matching"
    objective = from_dict(FlowMatching, options)
    assert [type(term).__name__ for term in objective.terms] == ["FlowTerm", "DirectionTerm"]


def test_plugins_register_themselves(package, monkeypatch):
    """An unknown name makes the registry ask the entry points, once."""
    import importlib.metadata as metadata

    asked = []

    class EntryPoint:
        name = "mypackage"

        def load(self):
            asked.append(self.name)
            SOLVERS.register("ralston", "mypackage.ralston:Ralston")

    monkeypatch.setattr(metadata, "entry_points", lambda group: [EntryPoint()] if group == "untwine.plugins" else [])
    monkeypatch.setattr("untwine.registry._plugins_loaded", False)
    assert SOLVERS["ralston"]().evaluations.__name__ == "evaluations"
    with pytest.raises(ValueError, match="did you mean 'ralston'"):
        SOLVERS["ralsten"]
    assert asked == ["mypackage"]
