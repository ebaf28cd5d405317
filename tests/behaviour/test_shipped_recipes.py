"""The recipes that come with the package."""

from __future__ import annotations

import pytest

from untwine.config import load_yaml
from untwine.training.recipe import RECIPES, Recipe

NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_trains_it_and_on_what(name: str):
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    assert f"untwine train {name}" in header and "Hardware:" in header


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_under_its_own_name_and_its_model_builds(name: str):
    told = load_yaml(RECIPES / f"{name}.yaml")
    if name == "folder":  # pictures of the user's own
        told["data"]["root"] = "pictures"
    recipe = Recipe.from_dict(told)
    assert recipe.name == name
    assert sum(parameter.numel() for parameter in recipe.model.build().parameters()) > 0
    recipe.objective.build()
