"""``untwine convert SOURCE --out FOLDER``: official weights, or a run, as a pipeline folder that loads anywhere."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from untwine.cli.options import brief, parse, show

# How the authors sample for their tables, by network; guidance intervals are in untwine's time.
PUBLISHED: dict[str, dict[str, Any]] = {
    "ddt": {"num_inference_steps": 250, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.7], "last_step": 0.04},
    "dit": {
        "num_inference_steps": 250,
        "guidance_scale": 1.5,
        "guidance_channels": 3,
        "solver": {"kind": "ddpm", "variance": "learned"},
    },
    "sit": {"num_inference_steps": 250, "guidance_scale": 1.5, "guidance_channels": 3},
}
PATHS = {"dit": {"kind": "discrete"}}
"""of networks that are not trained on the linear path"""


@dataclass(frozen=True)
class ConvertOptions:
    """Writes a saved pipeline, which `untwine sample`, untwine.load and ImagePipeline.from_pretrained read.

    A file as SOURCE holds official weights: Lightning .ckpt, .pt, .pth or .safetensors; averaged weights are taken
    where it has both. Only plain tensors are read from pickles, never code. Anything else is what `untwine sample`
    takes: a run or checkpoint folder, a shipped name, a saved pipeline, a hub id.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """official file, or a run, checkpoint or pipeline"""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """new or empty folder; it appears complete or not at all"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the written weights"""
    weights: Annotated[str, arg(metavar="ema:K|raw|posthoc:SIGMA")] = "ema:0"
    """which weights of a run"""
    system: Literal["ddt", "dit", "sit", "repa", "lightningdit", "rae", "ddt-head"] = "ddt"
    """whose official weights"""
    network: Annotated[
        Literal["ddt", "improved_dit", "dit", "sit", "lightningdit", "ddt_head"] | None, arg(metavar="NAME")
    ] = None
    """which network of it; default: told by the parameters"""
    config: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """official constructor argument that the weights do not tell; repeat for several"""
    latent_size: Annotated[tuple[int, int], arg(metavar="HEIGHT WIDTH")] = (32, 32)
    """grid that an official network samples by default"""


def run(args: list[str]) -> int:
    """The verb."""
    options = parse(ConvertOptions, "convert", args)
    out = options.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out: {out} exists and is not an empty folder; choose another or remove it")
    is_official = Path(options.source).is_file()
    if options.config and not is_official:
        raise ValueError(f"config: only official weights take it, and {options.source} is no file; leave it out")

    from untwine.pipelines.writing import prepare_folder

    prepare_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as staging:
        pipe = _official(options, Path(staging) / "official") if is_official else _loaded(options)
        pipe.save_pretrained(Path(staging) / "pipeline")
        (Path(staging) / "pipeline").rename(out)
    show(f"{options.source} -> {out}", _told(pipe, options.dtype))
    print(f"sample it: untwine sample {out}")
    return 0


def _loaded(options: ConvertOptions) -> Any:
    import torch

    from untwine.pipelines.loading import load

    return load(options.source, weights=options.weights, dtype=getattr(torch, options.dtype))


def _official(options: ConvertOptions, folder: Path) -> Any:
    """The pipeline of official weights, sampled by default as their authors do; ``folder`` receives the bare model."""
    import torch

    from untwine.integrations.official import convert
    from untwine.pipelines.image import ImagePipeline, provenance
    from untwine.pipelines.loading import load

    report = convert(Path(options.source), options.system, _arguments(options.config), folder, network=options.network)
    model = load(folder, dtype=getattr(torch, options.dtype)).model
    return ImagePipeline(
        model,
        path=PATHS.get(report.network),
        sampling=PUBLISHED.get(report.network),
        latent_shape=(model.config.in_channels, *options.latent_size),
        origin={
            "official": Path(options.source).name,
            "system": report.slug,
            "weights": report.weights,
            **provenance(),
        },
    )


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
