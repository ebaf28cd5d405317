"""``untwine info``: the tables of what there is; with a name, one of it or a checkpoint in detail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from untwine.cli.options import brief, parse, show

HOME = Path(__file__).resolve().parent.parent
TABLES = (
    "untwine.models:MODELS",
    "untwine.codecs:CODECS",
    "untwine.conditions:CONDITIONS",
    "untwine.encoders:ENCODERS",
    "untwine.adapters:ADAPTERS",
    "untwine.data:DATASETS",
    "untwine.diffusion:PATHS",
    "untwine.diffusion:TIME_DRAWS",
    "untwine.diffusion:SOLVERS",
    "untwine.training.objectives:OBJECTIVES",
    "untwine.training.objectives:TERMS",
    "untwine.acceleration.caching:SCHEDULES",
    "untwine.acceleration.caching:PREDICTORS",
)


@dataclass(frozen=True)
class InfoOptions:
    """Lists models, solvers, recipes and checkpoints, or shows one."""

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """anything that is listed, a run folder, a saved pipeline or a hub id"""


def run(args: list[str]) -> int:
    """The verb."""
    name = parse(InfoOptions, "info", args).name
    recipes = {file.stem: file for file in sorted((HOME / "recipes").glob("*.yaml"))}
    checkpoints = sorted(file.parent.name for file in (HOME / "assets").glob("*/model_index.json"))
    if name is None:
        _show_everything(recipes, checkpoints)
        return 0
    components = [registry for registry in _registries() if name in registry]
    for registry in components:
        _show_component(name, registry.noun, registry[name])
    is_checkpoint = name in checkpoints or "/" in name or Path(name).exists()
    if is_checkpoint:
        _show_checkpoint(name)
    if name in recipes:
        print(f"recipe {name}\n{recipes[name].read_text(encoding='utf-8')}", end="")
    if not (components or is_checkpoint or name in recipes):
        from untwine.registry import did_you_mean

        known = [*recipes, *checkpoints, *(known for registry in _registries() for known in registry)]
        raise ValueError(f"unknown name {name!r}{did_you_mean(name, known)}")
    return 0


def _registries() -> Iterator[Any]:
    for reference in TABLES:
        module, _, attribute = reference.partition(":")
        yield getattr(import_module(module), attribute)


def _show_everything(recipes: dict[str, Path], checkpoints: list[str]) -> None:
    """Everything by name, from tables that import nothing."""
    rows = {f"{registry.noun}s": ", ".join(registry) for registry in _registries()}
    show("untwine info NAME shows one of these in detail", rows | {"checkpoints": ", ".join(checkpoints) or "none"})
    about = {name: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for name, file in recipes.items()}
    show("\nrecipes (untwine train NAME)", about)


def _show_component(name: str, noun: str, cls: Any) -> None:
    from untwine.config.schema import entries_of, plain, type_name

    facts = {"class": f"{cls.__module__}.{cls.__name__}"}
    if noun == "model":
        facts |= {
            "accepts": ", ".join(sorted(cls.accepts)) or "no condition",
            "predicts": cls.predicts,
            "decoupled": "yes: encoder states can be reused between steps" if cls.decoupled else "no",
            "grids": "square only" if cls.square_only else "any",
            "most tokens": cls.max_tokens or "no limit",
            "sizes": ", ".join(f"{size} ({brief(options)})" for size, options in cls.SIZES.items()),
        }
    show(f"{noun} {name}: {(cls.__doc__ or '').partition(chr(10))[0]}", facts)
    options = {
        key: f"{type_name(option.annotation)}, {'required' if raw is MISSING else f'default {_short(plain(raw))}'}"
        for key, option, raw in entries_of(cls, {}, name)
    }
    if options:
        show("options", options)


def _short(value: Any) -> Any:
    return value.get("kind", value) if isinstance(value, dict) else value


def _show_checkpoint(name: str) -> None:
    from untwine.config import to_dict
    from untwine.pipelines.loading import load

    pipe = load(name)
    facts = {
        "model": f"{type(pipe.model).__name__}, {sum(p.numel() for p in pipe.model.parameters()):,} parameters",
        "samples": f"{pipe.sample_shape} from latents {pipe.latent_shape} by codec {pipe.config['codec']['kind']}",
        **_condition(pipe),
        "sampling": brief(to_dict(pipe.sampling)),
        "origin": brief(pipe.origin),
        "options": brief({k: v for k, v in pipe.model.config.items() if not k.startswith("_")}),
    }
    show(f"checkpoint {name}", facts)


def _condition(pipe: Any) -> dict[str, str]:
    if "condition" in pipe.config:
        return {"text": brief(pipe.config["condition"])}
    names = [f"{i} {text}" if text != str(i) else text for i, text in enumerate(pipe.class_names)]
    return {"classes": f"{pipe.num_classes}: {', '.join(names[:20])}" if pipe.num_classes else "none (unconditional)"}
