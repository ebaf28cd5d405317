"""Recipes: what is accepted, what comes back, and what every mistake is told."""

import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from untwine.config import Component, ConfigError, apply_flags, from_dict, load_yaml, to_dict
from untwine.registry import Registry

SHAPES = f"{__name__}:shapes"


class Shape:
    """Anything drawn."""

    kinds: ClassVar[str] = SHAPES


@dataclass(frozen=True)
class Circle(Shape):
    """A circle."""

    radius: float = 1.0
    """in metres"""

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"radius must be >= 0, got {self.radius}")


class Frame(Shape):
    """A frame around another shape.

    Args:
        width: of the border, in pixels.
    """

    def __init__(self, width: int, *, inner: Shape = Circle(2.0), canvas: object = None) -> None:
        self.width, self.inner, self.canvas = width, inner, canvas


class Blank(Shape):
    """Nothing."""


shapes = Registry("shape", {name.lower(): f"{__name__}:{name}" for name in ("Circle", "Frame", "Blank")})


@dataclass(frozen=True, kw_only=True)
class Model:
    hidden_size: int = 32
    """width D of the tokens"""
    dropout: float = 0.0
    mode: Literal["fast", "exact", 3] = "fast"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe."""

    model: Model = field(default_factory=Model)
    shape: Component[Shape] = field(default=Component(SHAPES, "circle"))
    second: Component[Shape] | None = None
    shapes: tuple[Component[Shape], ...] = ()
    named: dict[str, Component[Shape]] = field(default_factory=dict)
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    sizes: tuple[int, ...] = ()
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    clip: float | None = None
    count: int | float | str = 1
    compile: bool = False
    root: Path = Path("out")


FULL = """
model: {hidden_size: 64, mode: exact}
shape: {kind: frame, width: 3, inner: {kind: frame, width: 1}}
second: blank
shapes: [circle, {kind: circle, radius: 2}]
named: {a: blank}
lr: 3e-4
betas: [0, 0.95]
sizes: [1, 2, 3]
names: [no, on, 2020-01-01]
weights: {flow: 1}
clip: 1
count: 0.5
compile: true
root: runs/x
"""


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder, text):
    return from_dict(Recipe, load_yaml(write(folder, text)))


def test_values_and_types(tmp_path):
    recipe = read(tmp_path, FULL)
    assert recipe.lr == 3e-4
    assert recipe.betas == (0.0, 0.95)
    assert type(recipe.betas[0]) is float
    assert recipe.sizes == (1, 2, 3)
    assert recipe.names == ["no", "on", "2020-01-01"]
    assert recipe.model == Model(hidden_size=64, mode="exact")
    assert recipe.root == Path("runs/x")
    assert recipe.second == Component(SHAPES, "blank")
    assert recipe.shapes[1].options == {"radius": 2.0}


@pytest.mark.parametrize("text", [FULL, "lr: 1"])
def test_round_trip(tmp_path, text):
    recipe = read(tmp_path, text)
    data = to_dict(recipe)
    again = from_dict(Recipe, load_yaml(write(tmp_path, yaml.safe_dump(data), "again.yaml")))
    assert to_dict(again) == data
    assert again.betas == recipe.betas
    assert again.sizes == recipe.sizes


def test_resolved_options_hold_every_default(tmp_path):
    assert to_dict(read(tmp_path, "shape: {kind: frame, width: 3}"))["shape"] == {
        "kind": "frame",
        "width": 3,
        "inner": {"kind": "circle", "radius": 2.0},
    }
    assert to_dict(Recipe())["shape"] == {"kind": "circle", "radius": 1.0}


def test_build_makes_nested_components_and_takes_runtime_objects(tmp_path):
    component = read(tmp_path, FULL).shape
    frame = component.build(canvas="c")
    assert (frame.width, frame.canvas, frame.inner.width) == (3, "c", 1)
    assert frame.inner.inner == Circle(2.0)
    assert component.build(width=9).width == 9
    assert component.replace(width=8).build().width == 8
    assert component.options["width"] == 3
    with pytest.raises(ConfigError, match=r"frame\.widht: unknown option; did you mean 'width'"):
        component.replace(widht=8)


def test_instances_of_registered_dataclasses_keep_their_kind():
    assert to_dict(Circle(4.0)) == {"kind": "circle", "radius": 4.0}
    with pytest.raises(ConfigError, match="cannot write a Blank"):
        to_dict({"x": Blank()})


MISTAKES = [
    ("model: {hiden_size: 3}", r"recipe\.model\.hiden_size: unknown option; did you mean 'hidden_size'\?"),
    ("modle: {}", r"recipe\.modle: unknown option; did you mean 'model'\?"),
    ("shape: {kind: cirle}", r"recipe\.shape\.kind: unknown shape 'cirle'; did you mean 'circle'\?"),
    ("second: cirle", r"recipe\.second\.kind: unknown shape 'cirle'; did you mean 'circle'\?"),
    ("shape: {kind: circle, radus: 1}", r"recipe\.shape\.radus: unknown option; did you mean 'radius'\?"),
    ("shape: {radius: 1}", r"recipe\.shape: expected a shape as 'name' or \{kind: name, \.\.\.\}"),
    ("shape: {kind: frame}", r"recipe\.shape\.width: missing; give a value of type int"),
    ("shape: {kind: frame, width: 1, canvas: 2}", r"recipe\.shape\.canvas: unknown option"),
    ("shape: {kind: frame, width: 1, inner: {kind: frame}}", r"recipe\.shape\.inner\.width: missing"),
    ("shapes: [blank, {kind: circle, radius: x}]", r"recipe\.shapes\.1\.radius: expected float, got 'x'"),
    ("shapes: blank", r"recipe\.shapes: expected tuple.*, got 'blank'"),
    ("named: {a: {kind: circle, radius: []}}", r"recipe\.named\.a\.radius: expected float, got \[\]"),
    ("named: {1: blank}", r"recipe\.named: expected dict"),
    ("model: 3", r"recipe\.model: expected options of Model as a mapping, got 3"),
    ('lr: "3e-4"', r"recipe\.lr: expected float, got '3e-4'; write 3e-4 without quotes"),
    ('model: {hidden_size: "64"}', r"recipe\.model\.hidden_size: expected int, got '64'; write 64 without quotes"),
    ("model: {hidden_size: 1e3}", r"hidden_size: expected int, got 1000\.0; write 1000"),
    ("model: {hidden_size: 3.5}", r"hidden_size: expected int, got 3\.5$"),
    ("model: {hidden_size: true}", r"hidden_size: expected int, got True"),
    ("lr: true", r"recipe\.lr: expected float, got True"),
    ("lr: .nan", r"recipe\.lr: expected float, got nan"),
    ("lr:", r"recipe\.lr: expected float, got None"),
    ("clip: high", r"recipe\.clip: expected float, got 'high'"),
    ("count: true", r"recipe\.count: expected int or float or str, got True"),
    ("compile: yes", r"recipe\.compile: expected bool, got 'yes'"),
    ("compile: 1", r"recipe\.compile: expected bool, got 1"),
    ("model: {mode: slow}", r"recipe\.model\.mode: expected one of 'fast', 'exact', 3, got 'slow'"),
    ("betas: [0.9]", r"recipe\.betas: expected tuple\[float, float\], got \[0\.9\]"),
    ("betas: 0.9", r"recipe\.betas: expected tuple\[float, float\], got 0\.9"),
    ("sizes: [1, x]", r"recipe\.sizes\.1: expected int, got 'x'"),
    ("root: 3", r"recipe\.root: expected Path, got 3"),
    ("weights: [1]", r"recipe\.weights: expected dict"),
]


@pytest.mark.parametrize("text, message", MISTAKES, ids=[text for text, _ in MISTAKES])
def test_mistakes_are_named_with_their_full_path(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_dataclass_that_refuses_its_values_is_named():
    with pytest.raises(ConfigError, match=r"^recipe: radius must be >= 0, got -1"):
        from_dict(Circle, {"radius": -1})


def bomb(levels=9):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)])


FILES = [
    ("lr: 1\nmodel:\n  dropout: 0\n  dropout: 1\n", r"line 4: 'dropout' is given twice \(first on line 3\)"),
    ("lr: 1\nlr: 2\n", r"line 2: 'lr' is given twice"),
    ("lr: [1", r"(?s)recipe\.yaml: .*line 1"),
    ("a:\n\tb: 1", "recipe.yaml"),
    ("", r"expected options as 'name: value' lines, got NoneType"),
    ("- 1", r"expected options as 'name: value' lines, got list"),
    ("? [a]\n: 1", r"line 1: an option name must be a word"),
    ("x: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
    (bomb(), "aliases count in full"),
    ("a: &a [*a]", "levels"),
    ("a: " + "[" * 40 + "]" * 40, "32 levels"),
    ("a: " + "[" * 5000, "levels|line"),
    ("a: " + "x" * 1_100_000, "a recipe has at most 1000000"),
    ("base: none.yaml", r"none\.yaml"),
]


@pytest.mark.parametrize("text, message", FILES, ids=range(len(FILES)))
def test_hostile_and_broken_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_yaml(write(tmp_path, text))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        load_yaml(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    "text, value",
    [("3e-4", 3e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-2", -2), ("1_000", 1000), ("010", 10), (".inf", 1e999)]
    + [("yes", "yes"), ("off", "off"), ("12:30", "12:30"), ("0x10", "0x10"), ("~", None), ("True", True), ("e5", "e5")]
    + [("&a 1", 1), ("'1'", "1"), ("<<", "<<"), ("1e", "1e"), ("1__0", "1__0")],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path, text, value):
    read_value = load_yaml(write(tmp_path, f"x: {text}"))["x"]
    assert read_value == value
    assert type(read_value) is type(value)


@given(st.floats(allow_nan=False))
@settings(max_examples=100, deadline=None)
def test_every_float_survives_a_file(tmp_path_factory, value):
    path = write(tmp_path_factory.getbasetemp(), yaml.safe_dump({"lr": value}), "float.yaml")
    assert from_dict(Recipe, load_yaml(path)).lr == value


def test_base_is_merged_one_level(tmp_path):
    write(tmp_path, "lr: 1\nmodel: {hidden_size: 8, dropout: 0.5}\nshape: {kind: circle, radius: 3}", "base.yaml")
    data = load_yaml(write(tmp_path, "base: base.yaml\nmodel: {dropout: 0.25}\nshape: {kind: frame, width: 2}"))
    assert data == {
        "lr": 1,
        "model": {"hidden_size": 8, "dropout": 0.25},
        "shape": {"kind": "frame", "width": 2},
    }
    same_kind = load_yaml(write(tmp_path, "base: base.yaml\nshape: {kind: circle}", "same.yaml"))
    assert same_kind["shape"] == {"kind": "circle", "radius": 3}
    with pytest.raises(ConfigError, match="may not have a base itself"):
        load_yaml(write(tmp_path, "base: same.yaml", "third.yaml"))


def flags(text, *args):
    return apply_flags(Recipe, yaml.safe_load(text), args, prog="untwine train")


def test_flags_change_values_and_the_recipe_chooses_kinds():
    data = flags(
        "{shape: {kind: frame, width: 1}, shapes: [blank, circle], named: {a: circle}, weights: {flow: 1}}",
        *shlex.split("--lr 3e-4 --model.hidden-size 128 --model.mode 3 --shape.inner.radius 5 --shapes.1.radius 6"),
        *shlex.split("--named.a.radius 7 --betas 0.1 0.2 --sizes 4 5 6 --clip 1 --compile --root a/b --weights.flow 2"),
    )
    recipe = from_dict(Recipe, data)
    assert (recipe.lr, recipe.model.hidden_size, recipe.model.mode) == (3e-4, 128, 3)
    assert recipe.shape.build().inner == Circle(5.0)
    assert [s.kind for s in recipe.shapes] == ["blank", "circle"]
    assert recipe.shapes[1].build() == Circle(6.0)
    assert recipe.named["a"].build() == Circle(7.0)
    assert (recipe.betas, recipe.sizes, recipe.clip, recipe.compile) == ((0.1, 0.2), (4, 5, 6), 1.0, True)
    assert (recipe.root, recipe.weights, recipe.second) == (Path("a/b"), {"flow": 2.0}, None)


def test_without_flags_the_recipe_is_only_resolved():
    data = yaml.safe_load(FULL.replace("3e-4", "0.0003").replace("no, on, 2020-01-01", "a"))
    assert apply_flags(Recipe, data, []) == to_dict(from_dict(Recipe, data))


def test_a_flag_supplies_what_the_recipe_leaves_out(capsys):
    assert flags("shape: frame", "--shape.width", "4")["shape"]["width"] == 4
    with pytest.raises(SystemExit):
        flags("shape: frame")
    assert "--shape.width" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, told",
    [
        (["--model.hiden-size", "3"], "--model.hidden-size"),
        (["--model.hidden-size", "x"], "int"),
        (["--model.mode", "slow"], "fast"),
    ],
)
def test_wrong_flags_exit_with_the_right_one(args, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags("{}", *args)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_help_lists_every_option_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as stopped:
        flags("{shape: {kind: frame, width: 1}}", "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--model.hidden-size",
        "width D of the tokens",
        "--shape.width",
        "of the border",
        "in metres",
        "--clip",
    ):
        assert word in text


def test_mistakes_in_the_recipe_are_found_before_flags():
    with pytest.raises(ConfigError, match=r"recipe\.model\.hiden_size: unknown option"):
        flags("{model: {hiden_size: 3}}", "--lr", "1")


def test_importing_the_configuration_imports_no_torch():
    code = "import sys, untwine.config; sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
