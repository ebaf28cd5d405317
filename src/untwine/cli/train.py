"""``untwine train RECIPE``: train, or run the same command again to continue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from untwine.cli.options import log_to_console, parse_known, show


@dataclass(frozen=True)
class TrainOptions:
    """Trains a recipe in a folder; the same command on the same folder continues the run."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """name of a shipped recipe (untwine info lists them) or a YAML file"""
    out: Path | None = None
    """run folder; default runs/<recipe name>"""
    init: Path | None = None
    """run or checkpoint folder whose weights to start from (fine-tuning)"""
    init_weights: str = "ema:0"
    """which of its weights: ema:k or raw"""
    device: Literal["cpu", "cuda"] | None = None
    """default: CUDA where there is any"""
    dry_run: bool = False
    """build everything, print sizes, train nothing"""
    print_config: bool = False
    """print the resolved recipe and stop"""


def run(args: list[str]) -> int:
    """The verb."""
    also = "Any option of the recipe is a flag as well: untwine train RECIPE --help lists them."
    options, rest = parse_known(TrainOptions, "train", args, also)

    from untwine.config import apply_flags, load_yaml
    from untwine.training.recipe import Recipe, find_recipe

    data = load_yaml(find_recipe(options.recipe))
    recipe = Recipe.from_dict(apply_flags(Recipe, data, rest, prog=f"untwine train {options.recipe}"))
    if options.print_config:
        import yaml

        print(yaml.safe_dump(recipe.to_dict(), sort_keys=False), end="")
        return 0
    log_to_console()
    from untwine.training.trainer import Trainer

    trainer = Trainer(recipe, options.out, init=options.init, init_weights=options.init_weights, device=options.device)
    if options.dry_run:
        _describe(trainer)
        return 0
    try:
        result = trainer.fit()
    finally:
        trainer.processes.close()
    if trainer.processes.is_main:
        print(f"{result.folder}: step {result.step}, validation loss {result.metrics.get('validation_loss', 'n/a')}")
        print(f"sample it: untwine sample {result.folder}")
    return 0


def _describe(trainer) -> None:
    networks = trainer.networks
    show(
        f"untwine train {trainer.recipe.name} (dry run)",
        {
            "folder": trainer.out,
            "training samples": len(trainer.training_set),
            "held out": len(trainer.held_out),
            "parameters": f"{sum(p.numel() for p in networks.model.parameters()):,}",
            "checkpoint": f"{sum(t.numel() * t.element_size() for t in networks.tensors().values()) / 2**20:.1f} MiB",
            "steps": trainer.recipe.train.num_steps,
            "epochs": f"{trainer.recipe.train.num_steps * trainer.recipe.train.batch_size / len(trainer.training_set):.1f}",
            "device": trainer.processes.device,
            "processes": trainer.processes.world_size,
        },
    )
