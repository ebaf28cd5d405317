"""``untwine sample [CHECKPOINT]``: images into a folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from untwine.cli.options import brief, parse_known


@dataclass(frozen=True)
class SampleOptions:
    """Draws images. Image k is a function of seed, k, label and settings, whatever the batch size.

    The same command goes on where an interrupted one ended. Under torchrun the processes share the batches.
    """

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = "ddt-digits"
    """a shipped name, a run folder, a saved pipeline or a hub id"""
    out: Path = Path("out/samples")
    """folder for the pictures, grid.png, samples.npz and report.json; replaces an earlier set there"""
    count: int = 16
    """number of images"""
    labels: tuple[int, ...] = ()
    """classes to draw, repeated in turn; default: all of them"""
    prompt: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    """of a model of texts; may be given several times, and they come in turn; default: a few of its captions"""
    negative_prompt: Annotated[str | None, arg(metavar="TEXT")] = None
    """what guidance leads away from; default: the empty prompt"""
    text_encoder: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """of a model of texts, where its encoder lies elsewhere than in training"""
    size: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH")] = None
    """in pixels; default: as in training"""
    seed: int = 0
    batch_size: int = 64
    """images computed at once; changes speed and memory only"""
    solver: Annotated[str | None, arg(metavar="NAME")] = None
    """euler, heun, adams_bashforth, dopri5, ddim, ddpm; its options are flags such as --solver.order 3"""
    plan: Annotated[Path | None, arg(metavar="FILE")] = None
    """sharing plan of `untwine accelerate`; brings the sampler's settings"""
    weights: Annotated[str, arg(metavar="ema:K|raw|posthoc:SIGMA")] = "ema:0"
    """which weights of a run folder; posthoc puts an average together from snapshots (train.ema_snapshots_every)"""
    adapter: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """a LoRA for the model, as `untwine train` leaves it in RUN/adapter or peft saves it"""
    adapter_scale: float = 1.0
    """how much of it: 0 is the model alone"""
    device: Annotated[Literal["cpu", "cuda"] | None, arg(metavar="cpu|cuda")] = None
    """default: CUDA where there is any"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    pictures: FlagCreatePairsOff[bool] = True
    """do not write single pictures"""


ALSO = """The sampler's settings are flags as well, and default to those of the checkpoint: --num-inference-steps 50
--guidance-scale 2.0 --guidance-interval 0 0.7 --shift 1.0 --refresh-every 4 --forecast-order 2 ...
untwine sample CHECKPOINT --help lists them all."""


def run(args: list[str]) -> int:
    """The verb."""
    options, rest = parse_known(SampleOptions, "sample", args, ALSO)

    import torch

    from untwine.acceleration.sharing.plan import SharingPlan
    from untwine.config import apply_flags, from_dict, to_dict
    from untwine.diffusion import SOLVERS
    from untwine.diffusion.sampling import Sampling
    from untwine.pipelines.loading import load
    from untwine.pipelines.series import Series
    from untwine.pipelines.writing import draw_into, prepare_folder
    from untwine.training.distributed import DAY, Distributed

    if options.solver and options.solver not in SOLVERS:
        SOLVERS[options.solver]  # says which there are
    processes = Distributed.start(options.device, timeout_seconds=DAY)
    pipe = load(
        options.checkpoint,
        weights=options.weights,
        device=processes.device,
        dtype=getattr(torch, options.dtype),
        text_encoder=options.text_encoder,
    )
    if options.adapter is not None:
        from untwine.adapters.lora import load_lora

        load_lora(pipe.model, options.adapter).set_scale(options.adapter_scale)
    plan = None if options.plan is None else SharingPlan.load(options.plan)
    settings = to_dict(pipe.sampling if plan is None else plan.sampling)
    settings |= {"solver": options.solver} if options.solver else {}
    settings = apply_flags(Sampling, settings, rest, prog=f"untwine sample {options.checkpoint}")
    folder = prepare_folder(options.out)
    series = Series(
        pipe,
        count=options.count,
        labels=options.labels or None,
        prompts=options.prompt or None,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        batch_size=options.batch_size,
        size=options.size,
        sampling=from_dict(Sampling, settings, "sampling"),
        plan=plan,
    )
    report = draw_into(folder, series, pictures=options.pictures, on_batch=lambda done: _progress(done, options.count))
    if processes.is_main:
        made = "images" if pipe.makes_pictures else "latents (no codec for pictures is part of this checkpoint)"
        print(f"{options.count} {made} in {report['seconds']} s: {_main_file(folder, pipe.makes_pictures)}")
        print(f"from {options.checkpoint} ({brief(pipe.origin)})")
        print(f"seed {options.seed}, {brief(settings)}")
    processes.close()
    return 0


def _progress(done: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{count}", end="\n" if done == count else "", file=sys.stderr)


def _main_file(folder: Path, pictures: bool) -> Path:
    return folder / ("grid.png" if pictures else "samples.npz")
