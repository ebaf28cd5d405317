"""``untwine data``: what is done to data once, before training."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from untwine.cli.options import log_to_console, parse, parse_known, show

_USAGE = """usage: untwine data ACTION ...

  encode   keep the latents of a recipe's data in a folder, and train from there
  emoji    prepare the emoji data set from its npm packages

untwine data ACTION --help shows the options of an action.
"""


@dataclass(frozen=True)
class EncodeOptions:
    """Encodes the data of a recipe once. Train on it with the recipe that lies in the folder afterwards.

    Under torchrun the processes share the files of the cache.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """name of a shipped recipe or a YAML file; its codec makes the latents"""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("data/latents")
    """folder of the cache; the same command continues one that was broken off"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the stored means and deviations"""
    batch_size: int = 32
    """samples encoded at once"""
    shard_size: int = 4096
    """samples in a file"""
    device: Annotated[Literal["cpu", "cuda"] | None, arg(metavar="cpu|cuda")] = None
    """default: CUDA where there is any"""
    dry_run: FlagCreatePairsOff[bool] = False
    """print size and time, write nothing"""


@dataclass(frozen=True)
class EmojiOptions:
    """Prepares the emoji data set; needs npm and downloads about 80 MB for each style."""

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("data/emoji")
    """the folder to make"""
    styles: tuple[Literal["google", "twitter"], ...] = ("google", "twitter")
    """pictures under Apache-2.0 (google) and CC-BY 4.0 (twitter: give the attribution in emoji.json)"""
    skin_tones: FlagCreatePairsOff[bool] = False
    """with all five skin tones"""


ALSO = """Any option of the recipe is a flag as well, such as --data.resolution 256 --codec.path FOLDER;
untwine data encode RECIPE --help lists them all."""


def run(args: list[str]) -> int:
    """The verb."""
    actions = {"encode": _encode, "emoji": _emoji}
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if args[0] not in actions:
        from untwine.registry import did_you_mean

        raise ValueError(f"unknown action {args[0]!r}{did_you_mean(args[0], actions)}")
    return actions[args[0]](args[1:])


def _emoji(args: list[str]) -> int:
    options = parse(EmojiOptions, "data emoji", args)
    log_to_console()
    from untwine.data.emoji import METADATA, prepare

    counts = prepare(options.out, options.styles, skin_tones=options.skin_tones)
    print(f"{options.out}: " + ", ".join(f"{count} pictures of {style}" for style, count in counts.items()))
    print(f"licences and attribution: {options.out / METADATA}")
    return 0


def _encode(args: list[str]) -> int:
    options, rest = parse_known(EncodeOptions, "data encode", args, ALSO)

    from untwine.config import apply_flags, load_yaml
    from untwine.training.distributed import DAY, Distributed
    from untwine.training.recipe import Recipe, find_recipe

    data = load_yaml(find_recipe(options.recipe))
    recipe = Recipe.from_dict(apply_flags(Recipe, data, rest, prog=f"untwine data encode {options.recipe}"))
    log_to_console()
    processes = Distributed.start(options.device, timeout_seconds=DAY)
    try:
        _encode_with(recipe, options, processes)
    finally:
        processes.close()
    return 0


def _encode_with(recipe: Any, options: EncodeOptions, processes: Any) -> None:
    from untwine.data.encoding import Encoder
    from untwine.training.distributed import together
    from untwine.training.locking import lock

    made: list[Encoder] = []

    def make() -> None:
        encoder = Encoder(
            recipe.data.build(),
            recipe.codec.build(),
            options.out,
            made_by=recipe.codec.to_dict(),
            dtype=options.dtype,
            batch_size=options.batch_size,
            shard_size=options.shard_size,
            device=processes.device,
        )
        if processes.is_main:
            _announce(encoder, options)
        made.append(encoder)

    together(make)
    if options.dry_run:
        return
    with lock(options.out):
        manifest = made[0].run(
            (lambda done: _progress(done, len(made[0].dataset))) if processes.is_main else None,
            rank=processes.rank,
            world_size=processes.world_size,
            together=together,
        )
        if processes.is_main:
            _write_recipe(recipe, options.out)
    if processes.is_main:
        _tell(manifest, options.out)


def _tell(manifest: dict[str, Any], out: Path) -> None:
    statistics = manifest["statistics"]
    show(
        f"{out}: {sum(shard['count'] for shard in manifest['shards'])} samples",
        {
            "left out": f"{len(manifest['skipped'])} corrupt",
            "mean": f"{_numbers(statistics['mean'])} by channel",
            "deviation": f"{_numbers(statistics['std'])} by channel, {statistics['overall_std']:.3f} overall",
        },
    )
    print(f"train on it: untwine train {out / 'recipe.yaml'}")


def _announce(encoder: Any, options: EncodeOptions) -> None:
    told = encoder.estimate()
    facts = encoder.manifest
    kind = "mean and deviation" if facts["stochastic"] else "deterministic"
    show(
        f"untwine data encode {options.recipe}{' (dry run: nothing is written)' if options.dry_run else ''}",
        {
            "folder": options.out,
            "samples": f"{told.samples} of {tuple(facts['sample_shape'])}{', both sides' if facts['flips'] else ''}",
            "latents": f"{tuple(facts['latent_shape'])}, {kind}, {options.dtype}",
            "size": f"{told.num_bytes / 2**20:,.1f} MiB",
            "time": f"about {told.seconds:,.0f} s on {encoder.device}, measured on one batch",
        },
    )


def _write_recipe(recipe: Any, out: Path) -> None:
    """The same recipe with the cache as its data."""
    import yaml

    from untwine.config import Component
    from untwine.data.base import Dataset

    cached = recipe.to_dict() | {"data": Component(Dataset.kinds, "latents", {"root": str(out)}).to_dict()}
    (out / "recipe.yaml").write_text(yaml.safe_dump(cached, sort_keys=False), encoding="utf-8")


def _numbers(values: list[float]) -> str:
    shown = ", ".join(f"{value:.3f}" for value in values[:8])
    return f"{shown}{', ...' if len(values) > 8 else ''}"


def _progress(done: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{count}", end="\n" if done == count else "", file=sys.stderr)
