"""``untwine train RECIPE``: train, or run the same command again to continue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from untwine.cli.options import log_to_console, parse_known, show


@dataclass(frozen=True)
class TrainOptions:
    """Trains a recipe in a folder; the same command on the same folder continues the run."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """name of a shipped recipe (untwine info lists them) or a YAML file"""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """run folder; default runs/<recipe name>"""
    init: Annotated[str | None, arg(metavar="CHECKPOINT")] = None
    """whose weights to start from (fine-tuning): a run, or anything that `untwine sample` takes"""
    init_weights: Annotated[str, arg(metavar="ema:K|raw")] = "ema:0"
    """which weights of a run"""
    device: Annotated[Literal["cpu", "cuda"] | None, arg(metavar="cpu|cuda")] = None
    """default: CUDA where there is any"""
    profile: Annotated[int | None, arg(metavar="STEPS")] = None
    """profile so many steps: profile.json in the run folder for a trace viewer, and the ten costliest operations"""
    dry_run: FlagCreatePairsOff[bool] = False
    """build everything, print sizes, train nothing"""
    print_config: FlagCreatePairsOff[bool] = False
    """print the resolved recipe and stop"""


ALSO = """Any option of the recipe is a flag as well, such as --train.num-steps 500 --optimizer.lr 3e-4;
untwine train RECIPE --help lists them all."""


def run(args: list[str]) -> int:
    """The verb."""
    options, rest = parse_known(TrainOptions, "train", args, ALSO)

    from untwine.config import apply_flags, load_yaml
    from untwine.training.recipe import Recipe, find_recipe

    data = load_yaml(find_recipe(options.recipe))
    recipe = Recipe.from_dict(apply_flags(Recipe, data, rest, prog=f"untwine train {options.recipe}"))
    if options.print_config:
        import yaml

        print(yaml.safe_dump(recipe.to_dict(), sort_keys=False), end="")
        return 0
    log_to_console()
    from untwine.codecs import AUTOENCODERS
    from untwine.training.trainer import Trainer

    trainer = Trainer(
        recipe, options.out, init=_source(options), init_weights=options.init_weights, device=options.device
    )
    try:
        if trainer.processes.is_main:
            _note_captions(trainer)
        if options.dry_run:
            _describe(trainer)
            return 0
        result = trainer.fit(profile=options.profile)
    finally:
        trainer.processes.close()
    if trainer.processes.is_main:
        print(f"{result.folder}: step {result.step}, validation loss {_rounded(result.metrics.get('validation_loss'))}")
        is_codec = trainer.recipe.model.kind in AUTOENCODERS
        print("make it a codec:" if is_codec else "sample it:", end=" ")
        print(f"untwine convert {result.folder} --out FOLDER" if is_codec else f"untwine sample {result.folder}")
    return 0


def _source(options: TrainOptions) -> Any:
    """What ``--init`` names: the folder of a run, or the weights of a model; checked before anything is built."""
    if options.init is None:
        return None
    from untwine.pipelines.loading import load, open_run, shipped

    folder = Path(options.init)
    is_model = any((folder / name).is_file() for name in ("model_index.json", "config.json"))
    if options.init in shipped() or not folder.is_dir() or (is_model and not (folder / "manifest.json").is_file()):
        return load(options.init).model.state_dict()
    open_run(folder, options.init_weights)
    return folder


def _note_captions(trainer: Any) -> None:
    if trainer.dataset.captions is not None and trainer.text is None:
        print(
            f"{len(trainer.dataset)} captions are read, but the recipe has no condition: {{kind: text}}, and trains "
            "without them"
        )


def _condition(trainer: Any) -> dict[str, str]:
    if trainer.text is not None:
        return {"captions": f"such as {trainer.prompts[0]!r}, by {trainer.text.encoder} in {trainer.text.folder}"}
    names = trainer.dataset.class_names
    told = f"{len(names)}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "none"
    return {"classes": told}


def _rounded(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _describe(trainer: Any) -> None:
    recipe, networks = trainer.recipe, trainer.networks
    size, plan = len(trainer.training_set), recipe.train
    epochs = plan.num_steps * plan.batch_size / size
    show(
        f"untwine train {recipe.name} (dry run: nothing is trained or written)",
        {
            "folder": trainer.out,
            "data": f"{size} training samples, {len(trainer.held_out)} held out",
            **_condition(trainer),
            "model": f"{recipe.model.kind}, {sum(p.numel() for p in networks.model.parameters()):,} parameters",
            "latents": trainer.codec.latent_shape(trainer.dataset.sample_shape),
            "steps": f"{plan.num_steps} of {plan.batch_size} samples: {epochs:.1f} epochs",
            "checkpoint": f"{sum(t.numel() * t.element_size() for t in networks.tensors().values()) / 2**20:.1f} MiB",
            "device": f"{trainer.processes.device}, {trainer.processes.world_size} process(es)",
        },
    )
