"""``untwine bench``: quality against a setting of the sampler, losses of runs, and their pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from untwine.cli.options import parse, show

_USAGE = """usage: untwine bench ACTION ...

  quality  metrics of a checkpoint at several values of one setting: steps, guidance, encoder sharing
  loss     validation loss over training and over time bins, of one or several runs
  plot     one picture of several results of `quality`
  mup      a recipe at several widths: activations, or the best learning rate, under muP and without

untwine bench ACTION --help shows the options of an action.
"""


@dataclass(frozen=True)
class QualityOptions:
    """Draws the same images at several values of one setting and compares each set with real pictures."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """anything that untwine sample takes"""
    reference: Annotated[str, arg(metavar="REAL")]
    """what untwine evaluate --reference takes"""
    over: str = "num_inference_steps"
    """the setting: num_inference_steps, guidance_scale, refresh_every, forecast_order, shift"""
    values: tuple[float, ...] = (5, 10, 20, 50)
    """its values"""
    protocol: Annotated[str, arg(metavar="NAME")] = "fd-efflite0-1k"
    """as of untwine evaluate"""
    num_samples: int | None = None
    """another number than the protocol's; the result says so"""
    seed: int = 0
    batch_size: int = 64
    """pictures computed at once"""
    out: Path = Path("out/bench")
    """folder for quality.json and quality.png"""
    cache: Path = Path("out/references")
    """folder that keeps the features of references"""
    device: Annotated[Literal["cpu", "cuda"] | None, arg(metavar="cpu|cuda")] = None
    """default: CUDA where there is any"""


@dataclass(frozen=True)
class LossOptions:
    """Draws the validation losses of run folders from their log.jsonl."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
    """run folders"""
    out: Path = Path("out/bench")
    """folder for loss.json and loss.png"""


@dataclass(frozen=True)
class PlotOptions:
    """Draws several quality.json of one setting into one picture."""

    results: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE")]
    """results of untwine bench quality"""
    out: Path = Path("out/bench/plot.png")
    """the picture"""


@dataclass(frozen=True)
class MuPOptions:
    """Trains a recipe at several widths for a few steps, under muP and under the standard parametrization."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """name of a shipped recipe, or a YAML file"""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """hidden sizes; muP's base is the recipe's, else the first"""
    head_width: int | None = None
    """of every attention head; default: the recipe's"""
    lrs: tuple[float, ...] = ()
    """learning rates: sweeps them instead of checking the activations"""
    steps: int | None = None
    """optimizer steps of each run; default: 4, or 400 of a sweep"""
    seeds: int = 3
    """seeds that activations are averaged over"""
    batch_size: int | None = None
    """default: the recipe's"""
    out: Path = Path("out/bench")
    """folder for mup.json and mup.png"""


def run(args: list[str]) -> int:
    """The verb."""
    actions = {"quality": _quality, "loss": _loss, "plot": _plot, "mup": _mup}
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if args[0] not in actions:
        from untwine.registry import did_you_mean

        raise ValueError(f"unknown action {args[0]!r}{did_you_mean(args[0], actions)}")
    return actions[args[0]](args[1:])


def _quality(args: list[str]) -> int:
    options = parse(QualityOptions, "bench quality", args)

    import torch

    from untwine.cli.evaluate import reference_named
    from untwine.evaluation.protocols import find_protocol
    from untwine.pipelines.loading import load
    from untwine.pipelines.plots import draw_sweeps
    from untwine.pipelines.sweeps import sweep

    protocol = find_protocol(options.protocol, num_samples=options.num_samples)
    pipe = load(options.checkpoint, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = sweep(
        pipe,
        reference_named(options.reference),
        options.over.replace("-", "_"),
        [int(value) if float(value).is_integer() else value for value in options.values],
        protocol=protocol,
        seed=options.seed,
        batch_size=options.batch_size,
        cache=options.cache,
        on_value=lambda value, metrics: print(f"{options.over} {value}: {_brief(metrics)}", flush=True),
    )
    _write(options.out / "quality.json", {"checkpoint": options.checkpoint, **found})
    draw_sweeps({options.checkpoint: found}, options.out / "quality.png")
    floor = {name: value for name, value in (found["floor"] or {}).items() if isinstance(value, float)}
    show("untwine bench quality", {"floor": _brief(floor), "look at": options.out / "quality.png"})
    return 0


def _loss(args: list[str]) -> int:
    options = parse(LossOptions, "bench loss", args)

    from untwine.pipelines.plots import draw_losses
    from untwine.training.metering import read_log

    runs: dict[str, Any] = {}
    for folder in options.runs:
        log = folder / "log.jsonl"
        if not log.is_file():
            raise ValueError(f"runs: {folder} holds no log.jsonl; give the folder of a training run")
        lines = [line for line in read_log(log, "validation") if line["loss"] is not None]
        if not lines:
            raise ValueError(f"runs: {folder} was never validated; set train.validate_every and train.validation")
        runs[folder.name] = lines
    _write(options.out / "loss.json", runs)
    draw_losses(runs, options.out / "loss.png")
    show(
        "untwine bench loss",
        {name: f"{lines[-1]['loss']:.4f} at step {lines[-1]['step']}" for name, lines in runs.items()},
    )
    print(f"look at {options.out / 'loss.png'}")
    return 0


def _plot(args: list[str]) -> int:
    options = parse(PlotOptions, "bench plot", args)

    from untwine.pipelines.plots import draw_sweeps

    sweeps = {}
    for file in options.results:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            sweeps[f"{found['checkpoint']} ({file.parent.name})"] = {**found, "rows": list(found["rows"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"results: {file} is no result of untwine bench quality: {error}") from error
    if len(settings := {found["setting"] for found in sweeps.values()}) != 1:
        raise ValueError(
            f"results: they sweep different settings, {', '.join(sorted(settings)) or 'none'}; give one kind"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw_sweeps(sweeps, options.out)
    print(f"look at {options.out}")
    return 0


def _mup(args: list[str]) -> int:
    options = parse(MuPOptions, "bench mup", args)
    if len(options.widths) < 2 or min(options.widths) < 1 or options.seeds < 1:
        raise ValueError(f"widths must be at least two, and seeds >= 1, got {options.widths} and {options.seeds}")

    from untwine.training import widths as runs
    from untwine.training.recipe import Recipe

    given = Recipe.load(options.recipe)
    given = replace(given, train=replace(given.train, batch_size=options.batch_size or given.train.batch_size))
    given = runs.at_width(given, options.widths[0], head_width=options.head_width)
    found: dict[str, Any] = {}
    for name in runs.PARAMETRIZATIONS:
        recipe = runs.parametrized(given, name, options.widths[0])
        print(f"{name}:", flush=True)
        if options.lrs:
            steps = options.steps or 400
            kept = options.out / "losses.jsonl"
            found[name] = runs.learning_rates(
                recipe, options.widths, options.lrs, num_steps=steps, told=print, kept=kept
            )
        else:
            seeds = range(options.seeds)
            found[name] = runs.coordinate_check(
                recipe, options.widths, num_steps=options.steps or 4, seeds=seeds, told=print
            )
            print(runs.slope_table(found[name]), flush=True)
    widest = runs.at_width(runs.parametrized(given, "mup", options.widths[0]), options.widths[-1])
    _write(options.out / "mup.json", {"recipe": options.recipe, **found, "parameters": runs.described(widest)})
    (runs.draw_learning_rates if options.lrs else runs.draw_coordinates)(found, options.out / "mup.png")
    told = {name: result.get("best") or f"{result['largest_slope']:+.2f}" for name, result in found.items()}
    what = "best learning rate of each width" if options.lrs else "largest slope"
    show(f"untwine bench mup: {what}", {**told, "look at": options.out / "mup.png"})
    return 0


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _brief(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not name.endswith("_std"))
