"""``untwine sample [CHECKPOINT]``: images into a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from untwine.cli.options import parse_known, show


@dataclass(frozen=True)
class SampleOptions:
    """Draws images. Image k is a function of seed, k, label and settings, whatever the batch size."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = "ddt-digits"
    """a shipped name, a run folder, a saved pipeline or a hub id"""
    out: Path = Path("out/samples")
    count: int = 16
    labels: tuple[int, ...] = ()
    """classes to draw, repeated in turn; default: all of them"""
    seed: int = 0
    batch_size: int = 64
    solver: str | None = None
    """euler, heun, adams_bashforth, ddim, ddpm; its options are flags such as --solver.order 3"""
    weights: str = "ema:0"
    """of a run folder: ema:k or raw"""
    device: Literal["cpu", "cuda"] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    pictures: bool = True
    """write single pictures beside grid.png, samples.npz and report.json"""


def run(args: list[str]) -> int:
    """The verb."""
    also = "Settings such as --guidance-scale and --num-inference-steps are flags as well: add a CHECKPOINT to --help."
    options, rest = parse_known(SampleOptions, "sample", args, also)

    import torch

    from untwine.config import apply_flags, from_dict, to_dict
    from untwine.diffusion.sampling import Sampling
    from untwine.pipelines.loading import load, sample
    from untwine.pipelines.writing import prepare_folder, save_samples

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load(options.checkpoint, weights=options.weights, device=device, dtype=getattr(torch, options.dtype))
    settings = to_dict(pipe.sampling) | ({"solver": options.solver} if options.solver else {})
    settings = apply_flags(Sampling, settings, rest, prog=f"untwine sample {options.checkpoint}")
    folder = prepare_folder(options.out)
    samples = sample(
        pipe,
        count=options.count,
        labels=options.labels or None,
        seed=options.seed,
        batch_size=options.batch_size,
        sampling=from_dict(Sampling, settings, "sampling"),
    )
    save_samples(samples, folder, pictures=options.pictures)
    facts = {"images": options.count, "seconds": samples.report["seconds"], "grid": folder / "grid.png"}
    show(f"untwine sample {options.checkpoint}", facts | {"settings": settings})
    return 0
