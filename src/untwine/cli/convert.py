"""``untwine convert SOURCE --out FOLDER``: official weights, or a run, as a folder that loads anywhere."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from untwine.cli.options import brief, parse, show

LATENT_SIDE = 32
"""of official networks whose weights have no table of positions"""
TAKERS = {
    "config": "official weights",
    "latent_size": "official networks",
    "codec": "official networks",
    "encoder": "official decoders (--system rae-decoder)",
    "statistics": "official decoders (--system rae-decoder)",
}
TEXTS = {"kind": "text", "encoder": "Qwen/Qwen3-0.6B", "max_tokens": 256}
"""the frozen encoder of DiffusionBench's models of text"""


@dataclass(frozen=True)
class ConvertOptions:
    """Writes a saved pipeline, which `untwine sample`, untwine.load and ImagePipeline.from_pretrained read.

    A file as SOURCE holds official weights: Lightning .ckpt, .pt, .pth or .safetensors; averaged weights are taken
    where it has both. Only plain tensors are read from pickles, never code. Anything else is what `untwine sample`
    takes: a run or checkpoint folder, a shipped name, a saved pipeline, a hub id.

    A run that trained an autoencoder (rae-emoji), or an official decoder (--system rae-decoder), becomes a codec
    instead: the folder for `codec: {kind: rae, path: FOLDER}` in recipes, and for --codec here.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """official file, or a run, checkpoint or pipeline"""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """new or empty folder; it appears complete or not at all"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the written weights"""
    weights: Annotated[str, arg(metavar="ema:K|raw|posthoc:SIGMA")] = "ema:0"
    """which weights of a run"""
    system: Literal["ddt", "dit", "sit", "repa", "sra", "umd", "lightningdit", "rae", "rae-decoder", "ddt-head"] = "ddt"
    """whose official weights"""
    network: Annotated[
        Literal["ddt", "improved_dit", "dit", "sit", "umd", "lightningdit", "ddt_head"] | None, arg(metavar="NAME")
    ] = None
    """which network of it; default: told by the parameters"""
    config: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """official constructor argument that the weights do not tell; repeat for several"""
    latent_size: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH")] = None
    """grid that an official network samples by default; default: that of its table of positions, or 32 32"""
    codec: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """autoencoder of an official network's latents, so that it draws pictures"""
    encoder: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """of an official decoder: the encoder it is for, a checkpoint of transformers; without it, it only decodes"""
    statistics: Annotated[Path | None, arg(metavar="FILE")] = None
    """of an official decoder: mean and variance of its latents, stat.pt"""


def run(args: list[str]) -> int:
    """The verb."""
    options = parse(ConvertOptions, "convert", args)
    out = options.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out: {out} exists and is not an empty folder; choose another or remove it")
    is_official = Path(options.source).is_file()
    _check(options, is_official)

    from untwine.pipelines.writing import prepare_folder

    make = _from_official if is_official else _from_ours
    prepare_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as staging:
        facts = make(options, Path(staging))
        (Path(staging) / "result").rename(out)
    show(f"{options.source} -> {out}", facts)
    if "decodes" in facts:
        print(f"use it: codec: {{kind: rae, path: {out}}} in a recipe, or untwine convert ... --codec {out}")
    else:
        print(f"sample it: untwine sample {out}")
    return 0


def _check(options: ConvertOptions, is_official: bool) -> None:
    """Refuses options that the source has no use for."""
    is_decoder = options.system == "rae-decoder"
    for name, takers in TAKERS.items():
        fits = is_official and (name == "config" or is_decoder == (name in ("encoder", "statistics")))
        if getattr(options, name) and not fits:
            raise ValueError(f"{name}: only {takers} take it, not {options.source}; leave it out")


def _from_ours(options: ConvertOptions, folder: Path) -> dict[str, Any]:
    """Writes what a run or a saved pipeline holds."""
    if _is_autoencoder(Path(options.source)):
        from untwine.training.objectives.reconstruction import export

        _keep_float32(options)
        return _codec_facts(export(options.source, folder / "result", weights=options.weights))
    import torch

    from untwine.pipelines.loading import load

    pipe = load(options.source, weights=options.weights, dtype=getattr(torch, options.dtype))
    pipe.save_pretrained(folder / "result")
    return _told(pipe, options.dtype)


def _is_autoencoder(source: Path) -> bool:
    """Whether this is the folder of a run that trained one."""
    from untwine.codecs import AUTOENCODERS
    from untwine.pipelines.loading import CHECKPOINTS, open_run
    from untwine.training.checkpoint import read_config

    return (source / CHECKPOINTS).is_dir() and read_config(open_run(source, "raw"))["model"]["kind"] in AUTOENCODERS


def _from_official(options: ConvertOptions, folder: Path) -> dict[str, Any]:
    """Writes official weights, sampled by default as their authors do."""
    if options.system == "rae-decoder":
        return _decoder(options, folder)
    import torch

    from untwine.integrations.official import convert
    from untwine.integrations.published import published, published_path
    from untwine.pipelines.image import ImagePipeline, provenance
    from untwine.pipelines.loading import load
    from untwine.pipelines.text_to_image import TextToImagePipeline

    codec = None if options.codec is None else _codec(options.codec)
    bare, given = folder / "official", _arguments(options.config)
    report = convert(Path(options.source), options.system, given, bare, network=options.network)
    model = load(bare, dtype=getattr(torch, options.dtype)).model
    side = LATENT_SIDE if report.grid_side is None else report.grid_side * model.config.patch_size
    shape = (model.config.in_channels, *(options.latent_size or (side, side)))
    parts = {
        "codec": codec,
        "path": published_path(report.slug, shape),
        "sampling": published(report.slug, report.network, model.config, shape),
        "latent_shape": shape,
        "origin": {
            "official": Path(options.source).name,
            "system": report.slug,
            "weights": report.weights,
            **provenance(),
        },
    }
    takes_text = "tokens.text" in model.accepts
    pipe = TextToImagePipeline(model, **parts, condition=TEXTS) if takes_text else ImagePipeline(model, **parts)
    facts = _told(pipe, options.dtype)
    pipe.save_pretrained(folder / "result")
    return facts


def _decoder(options: ConvertOptions, folder: Path) -> dict[str, Any]:
    """Writes RAE's decoder, with its encoder where that is given, as a codec."""
    from untwine.codecs.rae import to_diffusers
    from untwine.codecs.rae_official import STATISTICS
    from untwine.integrations.official import from_official, load_official_file

    _keep_float32(options)
    weights = load_official_file(Path(options.source))
    if options.statistics is not None:
        statistics = load_official_file(options.statistics)
        if unknown := statistics.keys() - set(STATISTICS):
            raise ValueError(
                f"statistics: {options.statistics} holds {sorted(unknown)[:5]}, not mean and var (stat.pt)"
            )
        weights |= statistics
    decoder = from_official("rae-decoder", weights, _arguments(options.config))
    model = decoder if options.encoder is None else to_diffusers(decoder, options.encoder)
    model.save_pretrained(folder / "result")
    return _codec_facts(model)


def _keep_float32(options: ConvertOptions) -> None:
    if options.dtype != "float32":
        raise ValueError("dtype: autoencoders are written in float32; codec.dtype says what they compute in")


def _codec(folder: Path) -> dict[str, str]:
    """A codec's options, its kind told by the class of the autoencoder."""
    import json

    from untwine.codecs.rae import CLASSES

    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"codec: {folder} holds no config.json of an autoencoder ({error})") from error
    if name not in CLASSES and name != "AutoencoderKL":
        raise ValueError(f"codec: {folder} holds a {name}, not one of AutoencoderKL, {', '.join(CLASSES)}")
    return {"kind": "rae" if name in CLASSES else "vae", "path": str(folder)}


def _arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``KEY=VALUE`` words with the values read as YAML scalars."""
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise ValueError(f"config: expected KEY=VALUE, got {pair!r}; for example --config num_groups=16")
        found[key] = yaml.safe_load(value)
    return found


def _codec_facts(model: Any) -> dict[str, Any]:
    from untwine.codecs.rae import geometry

    size = sum(p.numel() for p in model.decoder.parameters())
    latents, side = geometry(model.config, Path(type(model).__name__))
    facts = {
        "model": f"{type(model).__name__}, decoder of {size:,} parameters",
        "latents": latents,
        "decodes": f"to {side} x {side} pixels",
    }
    if "representation" in model.config and model.config.representation is None:
        facts["note"] = "a decoder alone, for sampling: training needs its encoder (--encoder)"
    return facts


def _told(pipe: Any, dtype: str) -> dict[str, Any]:
    size = sum(p.numel() for p in pipe.model.parameters())
    facts = {
        "model": f"{type(pipe.model).__name__}, {size:,} parameters, {dtype}",
        "latents": pipe.latent_shape,
        "origin": brief(pipe.origin),
    }
    if not pipe.makes_pictures:
        facts["note"] = "no image codec comes with these weights: sampling gives latents, not pictures"
    return facts
