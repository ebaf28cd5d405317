"""Every page of the documentation does what it shows, from an empty folder and without a network."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.docs.pages import DOCS, blocks, pictures, run_page
from untwine.training.parametrization import resized
from untwine.training.recipe import Recipe

TUTORIALS = sorted(DOCS.glob("tutorials/*.md"))
PAGES = [DOCS / "index.md", DOCS / "getting-started.md", *TUTORIALS, DOCS / "troubleshooting.md"]
GUIDES = {
    "masked-diffusion": {
        "untwine train": "--train.num-steps 2 --train.validation 20",
        "untwine sample": "--count 4 --num-inference-steps 3",
    },
    "text-to-image": {"untwine sample": "--num-inference-steps 5"},
}
"""page -> how a command of it starts -> what makes it short"""
SHOWN_ONLY = {"text", "yaml", "json", "sh"}


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    logger = logging.getLogger("untwine")
    handlers, level = list(logger.handlers), logger.level
    yield tmp_path
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page, empty_folder):
    ran = run_page(page)
    assert ran >= 1, f"{page.name} shows nothing that runs"
    for made, shown in pictures(page):
        assert _distance(Path(made), shown) < 2, f"{shown.name} is no longer what the page's commands draw"


@pytest.mark.parametrize("page", GUIDES)
def test_guide_runs_shortened(page, empty_folder):
    assert run_page(DOCS / f"{page}.md", GUIDES[page]) >= 2


@pytest.mark.parametrize("page", ["objectives", "learn-faster", "masked-diffusion", "rae", "text-to-image"])
def test_lines_of_recipes_load(page):
    """Every ``yaml`` block is part of a recipe."""
    parts = [yaml.safe_load(code) for language, code in blocks(DOCS / f"{page}.md") if language == "yaml"]
    assert parts
    for part in parts:
        given = {"name": "page", "data": {"kind": "digits"}, "model": {"kind": "ddt"}, "train": {"num_steps": 1}}
        recipe = Recipe.from_dict({**given, **part})
        recipe.objective.build()
        if recipe.mup is not None:
            assert resized(recipe.model.to_dict(), recipe.mup.base_width)["num_heads"] == 2


def test_there_are_the_promised_tutorials():
    assert {page.stem for page in TUTORIALS} >= {
        "own-folder",
        "latents",
        "fine-tune",
        "official-weights",
        "sampling",
        "core",
        "coming-from",
    }


def test_pictures_say_what_makes_them():
    """Every picture of samples is compared with what its page draws, save those of the README, results and benchmarks.

    The pages of the studio are pictures that a browser draws.
    """
    compared = {shown.name for page in PAGES for _, shown in pictures(page)}
    measured = {
        Path(path).name
        for page in (DOCS.parent / "README.md", DOCS / "results.md")
        for path in re.findall(r"\]\((\S+?\.png)\)", page.read_text(encoding="utf-8"))
    }
    benchmarks = "".join(file.read_text() for file in (DOCS.parent / "benchmarks").glob("*.py"))
    drawn = {path.name for path in DOCS.glob("images/*.png") if f'"{path.name}"' in benchmarks}
    assert compared == {path.name for path in DOCS.glob("images/*.png")} - measured - drawn


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_fence_is_known(page):
    """A misspelt language would silently not be run."""
    languages = {language for language, _ in blocks(page)}
    assert languages <= {"bash", "python", "pycon", "console"} | SHOWN_ONLY
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks(page)), f"{page.name} has a fence without a language"


def _distance(a: Path, b: Path) -> float:
    """Mean absolute difference in grey levels; infinite for pictures of different size."""
    first, second = (np.asarray(Image.open(path).convert("RGB"), np.float32) for path in (a, b))
    return float(np.abs(first - second).mean()) if first.shape == second.shape else float("inf")
