"""``untwine info``: the tables of what there is; with a name, one model, recipe or checkpoint in detail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from untwine.cli.options import parse, show


@dataclass(frozen=True)
class InfoOptions:
    """Lists models, solvers, recipes and checkpoints, or shows one."""

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """a model, a recipe, or a checkpoint (shipped name, run folder, saved pipeline)"""


def run(args: list[str]) -> int:
    """The verb."""
    options = parse(InfoOptions, "info", args)
    if options.name is None:
        show("untwine", _tables())
        return 0
    from untwine.models import MODELS

    recipes = _recipes()
    if options.name in MODELS:
        _show_model(options.name)
    elif options.name in recipes:
        print(recipes[options.name].read_text(encoding="utf-8"), end="")
    else:
        _show_checkpoint(options.name)
    return 0


def _recipes() -> dict[str, Path]:
    folder = Path(__file__).resolve().parent.parent / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _tables() -> dict[str, str]:
    """Everything by name, from tables that import nothing."""
    from untwine.codecs import CODECS
    from untwine.data import DATASETS
    from untwine.diffusion import PATHS, SOLVERS, TIME_DRAWS
    from untwine.models import MODELS
    from untwine.training.objectives import OBJECTIVES, TERMS

    assets = Path(__file__).resolve().parent.parent / "assets"
    registries = [MODELS, CODECS, DATASETS, PATHS, TIME_DRAWS, SOLVERS, OBJECTIVES, TERMS]
    return {f"{registry.noun}s": ", ".join(registry) for registry in registries} | {
        "recipes": ", ".join(_recipes()),
        "checkpoints": ", ".join(sorted(f.parent.name for f in assets.glob("*/model_index.json"))) or "none",
    }


def _show_model(name: str) -> None:
    from untwine.config import Component
    from untwine.models import MODELS

    cls = MODELS[name]
    facts = {
        "class": f"untwine.{cls.__name__}",
        "accepts": ", ".join(sorted(cls.accepts)) or "nothing",
        "predicts": cls.predicts,
        "decoupled": cls.decoupled,
        "square only": cls.square_only,
        "most tokens": cls.max_tokens or "no limit",
        "sizes": ", ".join(getattr(cls, "SIZES", {})),
    }
    options = Component("untwine.models:MODELS", name).to_dict()
    show(name, facts | {f"option {key}": value for key, value in options.items() if key != "kind"})


def _show_checkpoint(name: str) -> None:
    from untwine.pipelines.loading import load

    pipe = load(name)
    facts = {
        "model": type(pipe.model).__name__,
        "parameters": f"{sum(p.numel() for p in pipe.model.parameters()):,}",
        "latent shape": pipe.latent_shape,
        "classes": f"{pipe.num_classes}: {', '.join(pipe.class_names[:20])}" if pipe.num_classes else "none",
        "sampling": pipe.sampling,
        **{f"origin {key}": value for key, value in pipe.origin.items()},
    }
    options = {f"option {key}": value for key, value in pipe.model.config.items() if not key.startswith("_")}
    show(name, facts | options)
