"""One recipe at several widths: how activations grow with the width, and which learning rate is best at each.

The coordinate check of muP (arXiv 2203.03466, appendix D.1): the mean size of what every layer puts out, over the first
optimizer steps, must not depend on the width; under the standard parametrization some layers' grow with every step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor, nn

from untwine.plotting import figure
from untwine.training.metering import read_log
from untwine.training.nonfinite import TrainingDiverged
from untwine.training.optim import ConstantSchedule, Muon
from untwine.training.parametrization import WIDTHS, MuP, resized
from untwine.training.recipe import Recipe, fit_to_data
from untwine.training.trainer import Trainer

PARAMETRIZATIONS = ("mup", "standard")
Told = Callable[[str], None]
logger = logging.getLogger(__name__)


def at_width(recipe: Recipe, width: int, *, head_width: int | None = None) -> Recipe:
    """The recipe with its model at another ``hidden_size``: heads as wide as before or of ``head_width``, not fewer
    blocks; a second width is in proportion."""
    config = recipe.model.to_dict()
    if head_width is not None:
        config |= {size: head_width * config[heads] for size, heads in WIDTHS.items() if size in config}
    return replace(recipe, model=recipe.model.replace(**resized(config, width)))


def coordinate_check(
    recipe: Recipe,
    widths: Sequence[int],
    *,
    num_steps: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
    told: Told = logger.info,
) -> dict[str, Any]:
    """Mean ``|output|`` of every layer before each of the first optimizer steps, and its slope over the width.

    Training is that of the recipe at a constant rate. A slope is of log size over log width, the size averaged over
    seeds; layers that still put out zeros have none.

    Args:
        recipe: with ``mup`` set, or None there for the standard parametrization.
        widths: at least two.
        num_steps: optimizer steps made; sizes are taken before the first and after each.

    Returns:
        ``sizes``: layer -> (widths, num_steps + 1); ``slopes``: layer -> (num_steps + 1); ``largest_slope``.
    """
    sizes: dict[str, list[list[float]]] = {}
    for width in widths:
        found = [_sizes(replace(at_width(recipe, width), seed=seed), num_steps) for seed in seeds]
        for layer in found[0]:
            sizes.setdefault(layer, []).append(np.mean([run[layer] for run in found], 0).tolist())
        told(f"width {width}: {len(found)} runs of {num_steps} steps")
    slopes = {layer: _slopes(widths, rows) for layer, rows in sizes.items()}
    largest = max((s for row in slopes.values() for s in row if s is not None), key=abs)
    return {"widths": list(widths), "sizes": sizes, "slopes": slopes, "largest_slope": largest}


def learning_rates(
    recipe: Recipe,
    widths: Sequence[int],
    lrs: Sequence[float],
    *,
    num_steps: int,
    told: Told = logger.info,
    kept: Path | None = None,
) -> dict[str, Any]:
    """The validation loss (its flow part, where there is one) of every width and learning rate.

    Args:
        kept: a JSONL file of the losses of finished runs, by recipe and length; the same call continues.

    Returns:
        ``losses``: (widths, lrs), None where the run diverged; ``best``: the best rate of each width.
    """
    losses: list[list[float | None]] = []
    for width in widths:
        losses.append([_kept_loss(with_rate(at_width(recipe, width), lr), num_steps, kept) for lr in lrs])
        told(f"width {width}: " + ", ".join(f"{lr:g} {_text(loss)}" for lr, loss in zip(lrs, losses[-1])))
    best = [min(zip(row, lrs), key=lambda pair: math.inf if pair[0] is None else pair[0])[1] for row in losses]
    return {"widths": list(widths), "lrs": list(lrs), "num_steps": num_steps, "losses": losses, "best": best}


def with_rate(recipe: Recipe, lr: float) -> Recipe:
    """The recipe at another learning rate; that of Muon's AdamW keeps its proportion."""
    optimizer: Any = recipe.optimizer
    changes: dict[str, Any] = {"lr": lr}
    if isinstance(optimizer, Muon):
        changes["rest"] = replace(optimizer.rest, lr=optimizer.rest.lr * lr / optimizer.lr)
    return replace(recipe, optimizer=replace(optimizer, **changes))


def parametrized(recipe: Recipe, name: str, base_width: int) -> Recipe:
    """The recipe under "mup" (its own, or of that base width) or the "standard" parametrization."""
    return replace(recipe, mup=(recipe.mup or MuP(base_width=base_width)) if name == "mup" else None)


def described(recipe: Recipe) -> dict[str, Any]:
    """muP's table of the recipe's model as plain data, by parameter."""
    assert recipe.mup is not None
    dataset = recipe.data.build()
    model = fit_to_data(recipe, dataset, dataset.bind(recipe.codec.build())).model.build()
    return {name: asdict(row) for name, row in recipe.mup.table(model).items()}


def slope_table(check: dict[str, Any]) -> str:
    """Lines of layer, slope after each step, and size at every width after the last one."""
    lines = [f"{'layer':<20} slope after 0, 1, ... steps / size at each width"]
    for layer, slopes in check["slopes"].items():
        told = " ".join("   --" if slope is None else f"{slope:+.2f}" for slope in slopes)
        lines.append(f"{layer:<20} {told} / " + " ".join(f"{row[-1]:.3g}" for row in check["sizes"][layer]))
    return "\n".join(lines)


def draw_coordinates(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Sizes over the width, one panel a parametrization, a line a layer, after the last step."""
    sheet, axes = figure(len(found), size=(5.2 * len(found), 4.4))
    for panel, (name, check) in zip(axes, found.items()):
        for layer, rows in check["sizes"].items():
            last = [row[-1] for row in rows]
            panel.plot(check["widths"], last, marker="o", markersize=3, linewidth=1, label=layer)
        panel.set(xscale="log", yscale="log", xlabel="width", ylabel="mean |output| after the last step")
        panel.set(title=f"{name}: largest slope {check['largest_slope']:+.2f}")
        panel.set_xticks(check["widths"], check["widths"])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    sheet.savefig(path, dpi=140)


def draw_learning_rates(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Losses over the learning rate, one panel a parametrization, a line a width, its best rate as a ring.

    Panels share their range, which leaves out losses far above the best of a width.
    """
    sheet, axes = figure(len(found), size=(5.2 * len(found), 4.4))
    rows = [[v for v in row if v is not None] for sweep in found.values() for row in sweep["losses"]]
    best = [min(row) for row in rows if row] or [1.0]
    for panel, (name, sweep) in zip(axes, found.items()):
        for width, row in zip(sweep["widths"], sweep["losses"]):
            losses = np.array([math.nan if v is None else v for v in row])
            (line,) = panel.plot(sweep["lrs"], losses, marker="o", markersize=4, label=width)
            if not np.isnan(losses).all():
                k = int(np.nanargmin(losses))
                panel.plot(sweep["lrs"][k], losses[k], "o", markersize=10, fillstyle="none", color=line.get_color())
        panel.set(xscale="log", xlabel="learning rate", ylabel=f"loss after {sweep['num_steps']} steps", title=name)
        panel.set_ylim(0.95 * min(best), 1.6 * max(best))
        panel.set_xticks(sweep["lrs"], [f"{lr:.2g}" for lr in sweep["lrs"]], rotation=30)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.legend(title="width", fontsize=9)
    sheet.savefig(path, dpi=140)


def _sizes(recipe: Recipe, num_steps: int) -> dict[str, list[float]]:
    """Layer -> its mean absolute output before each optimizer step."""
    train = replace(recipe.train, num_steps=num_steps + 1, validation=0, accumulation=1, **_QUIET)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as hooks:
        trainer = Trainer(replace(recipe, train=train, schedule=ConstantSchedule()), Path(folder) / "run")
        for name, module in _layers(trainer.networks.model):
            hooks.callback(module.register_forward_hook(partial(_measure, found.setdefault(name, []))).remove)
        trainer.fit(console=Console(quiet=True))
    return found


_QUIET: dict[str, Any] = {
    "sample_every": None, "evaluate_every": None, "ema_snapshots_every": None, "loggers": (), "save_every": 10**9,
}  # fmt: skip


def _layers(model: Any) -> list[tuple[str, nn.Module]]:
    """Every site, and the modules beside the blocks."""
    beside = [name for name, module in model.named_children() if module is not model.blocks]
    return [(name, model.get_submodule(name)) for name in dict.fromkeys([*beside, *model.sites()])]


def _measure(sizes: list[float], module: nn.Module, args: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor):
        sizes.append(float(first.detach().abs().mean()))


def _kept_loss(recipe: Recipe, num_steps: int, kept: Path | None) -> float | None:
    if kept is None:
        return _loss(recipe, num_steps)
    optimizer: Any = recipe.optimizer
    told = json.dumps([recipe.to_dict(), num_steps], sort_keys=True)
    key = hashlib.sha256(told.encode()).hexdigest()[:24]
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    found = {line["run"]: line["loss"] for line in map(json.loads, lines)}
    if key not in found:
        found[key] = _loss(recipe, num_steps)
        facts = {"width": recipe.model.options["hidden_size"], "lr": optimizer.lr, "seed": recipe.seed}
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": key, **facts, "steps": num_steps, "loss": found[key]}) + "\n")
    return found[key]


def _loss(recipe: Recipe, num_steps: int) -> float | None:
    train = replace(recipe.train, num_steps=num_steps, validate_every=num_steps, **_QUIET)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        try:
            Trainer(replace(recipe, train=train), run).fit(console=Console(quiet=True))
        except TrainingDiverged:
            return None
        line = read_log(run / "log.jsonl", "validation")[-1]
        loss = line.get("flow", line["loss"])
        return loss if loss is not None and math.isfinite(loss) else None


def _slopes(widths: Sequence[int], rows: Sequence[Sequence[float]]) -> list[float | None]:
    """One a step; None where a width puts out zeros."""
    found: list[float | None] = []
    for values in zip(*rows):
        fits = min(values) > 0
        found.append(float(np.polyfit(np.log(widths), np.log(values), 1)[0]) if fits else None)
    return found


def _text(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"
