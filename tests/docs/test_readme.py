"""What the README tells a newcomer to type is typed here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from untwine.cli import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("untwine ")
]
SHORT = {
    "train": ["--train.num-steps", "2", "--train.batch-size", "4", "--train.validation", "10"],
    "evaluate": ["--num-samples", "80", "--num-inference-steps", "5"],
    "accelerate": ["--images", "4", "--probe-images", "2", "--no-front"],
}


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with a few pictures, and nothing else."""
    monkeypatch.chdir(tmp_path)
    for k in range(24):
        path = tmp_path / "my_images" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (70, 80), (10 * k, 100, 200 - 5 * k)).save(path)


def test_python_example_runs(somewhere):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["samples"].images.shape == (20, 8, 8, 1)
    assert Image.open("three.png").size == (8, 8)


def test_commands_run(somewhere, capsys):
    """In the order of the page; what takes long is cut short, official weights are not at hand."""
    assert len(COMMANDS) >= 6
    ran = 0
    for command in COMMANDS:
        if command[1] == "convert":
            continue
        more = SHORT.get(command[1], [])
        assert main([*command[1:], *more]) == 0, f"{shlex.join(command)}: {capsys.readouterr().err}"
        ran += 1
    assert ran >= 6
    assert Path("out/samples/grid.png").is_file()
    assert Path("runs/digits/checkpoints/step-2/manifest.json").is_file()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_pictures_exist():
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / path).is_file(), path


def test_pictures_are_those_of_the_commands_below_them(somewhere):
    """The samples that the command under a picture draws are those in it, up to rounding."""
    shown = re.findall(r"!\[[^\]]*\]\((\S+)\)\n\n\*`(untwine sample [^`]+)`", TEXT)
    assert [Path(path).stem for path, _ in shown] == ["ddt-digits", "ddt-fashion", "ddt-emoji"]
    for path, command in shown:
        assert main([*shlex.split(command)[1:], "--out", "drawn", "--no-pictures"]) == 0
        drawn, picture = (np.asarray(Image.open(file), float) for file in ("drawn/grid.png", ROOT / path))
        assert drawn.shape == picture.shape
        assert np.abs(drawn - picture).mean() < 1, path


def test_figures_are_those_of_the_results():
    """The tables are what benchmarks/figures.py makes of benchmarks/results."""
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run python benchmarks/figures.py"
