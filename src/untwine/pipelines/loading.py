"""From a name, a folder or a hub id to a pipeline, and from a pipeline to a set of samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from untwine.config import to_dict
from untwine.diffusion.sampling import Sampling
from untwine.pipelines.image import ImagePipeline, provenance
from untwine.registry import did_you_mean
from untwine.training import checkpoint
from untwine.training.recipe import Recipe
from untwine.training.trainer import CHECKPOINTS

ASSETS = Path(__file__).resolve().parent.parent / "assets"
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def shipped() -> list[str]:
    """Names of the checkpoints that come with untwine."""
    return sorted(folder.parent.name for folder in ASSETS.glob("*/model_index.json"))


def load(
    source: str | Path,
    *,
    weights: str = "ema:0",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ImagePipeline:
    """A pipeline from a shipped name, a run or checkpoint folder, a saved pipeline, or a hub id.

    Args:
        source: ``ddt-digits``; ``runs/mine`` (its newest checkpoint); a folder with ``model_index.json``; ``owner/name``.
        weights: of a run, ``ema:k`` or ``raw``.

    Raises:
        ValueError: for an unknown source, a pickle (only ``untwine convert`` opens those), or weights the run lacks.
    """
    path = ASSETS / str(source) if str(source) in shipped() else Path(source)
    if path.suffix in _PICKLES:
        raise ValueError(f"{path} may hold a pickle, which is not loaded; convert it first: untwine convert {path} ...")
    if (path / "model_index.json").is_file():
        pipe = ImagePipeline.from_pretrained(str(path), use_safetensors=True, local_files_only=True, dtype=dtype)
    elif path.is_dir():
        pipe = _from_run(path, weights).to(dtype=dtype)
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")) and not path.exists():
        pipe = ImagePipeline.from_pretrained(str(source), use_safetensors=True, dtype=dtype)
    else:
        raise ValueError(
            f"unknown checkpoint {str(source)!r}{did_you_mean(str(source), shipped())}; or give a run folder, a saved "
            "pipeline or a hub id owner/name"
        )
    pipe.model.eval().requires_grad_(False)
    return pipe.to(device)  # type: ignore[return-value]


def _from_run(folder: Path, weights: str) -> ImagePipeline:
    """The pipeline of a run's newest intact checkpoint, or of one checkpoint."""
    if (folder / "manifest.json").is_file():
        path = folder
    else:
        inner = folder / CHECKPOINTS
        path = checkpoint.latest(inner if inner.is_dir() else folder)
        if path is None:
            raise ValueError(
                f"{folder} holds no checkpoint and no model_index.json; give a run folder or a saved pipeline"
            )
    recipe = Recipe.from_dict(checkpoint.read_config(path))
    state = checkpoint.read_state(path)
    model = recipe.model.build()
    prefix = "model." if weights == "raw" else f"ema.{weights.removeprefix('ema:')}."
    wanted = {prefix + name: p.detach() for name, p in model.named_parameters()}
    report = checkpoint.load_matching(path, wanted)
    if report.reinitialised:
        raise ValueError(f"weights: {path} has no complete {weights!r}; it lacks {list(report.reinitialised)[:5]}")
    return ImagePipeline(
        model,
        codec=recipe.codec.to_dict(),
        path=to_dict(recipe.objective.build().path),
        sampling=to_dict(recipe.sampling),
        latent_shape=state["latent_shape"],
        class_names=state["class_names"],
        origin={"recipe": recipe.name, "step": state["step"], "weights": weights, **provenance()},
    )


@dataclass(frozen=True)
class Samples:
    """Generated images with what is needed to make them again."""

    images: np.ndarray
    """(N, H, W, C) uint8"""
    labels: np.ndarray | None
    """(N,) int64"""
    report: dict[str, Any]
    """seconds, network evaluations, settings, seed, versions"""


def sample(
    source: str | Path | ImagePipeline = "ddt-digits",
    *,
    count: int = 16,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    sampling: Sampling | None = None,
    on_batch: Callable[[int], None] | None = None,
    **changes: Any,
) -> Samples:
    """``count`` images; without labels the classes come in turn, and image k is the same for every batch size.

    Args:
        source: anything :func:`load` takes, or a pipeline.
        labels: one per image, or fewer, repeated in turn.
        sampling: all settings; ``changes`` are single fields of it, such as ``guidance_scale=2.0``.
        on_batch: hears how many images are done.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    pipe = source if isinstance(source, ImagePipeline) else load(source)
    settings = replace(sampling or pipe.sampling, **changes)
    if labels is None and pipe.num_classes:
        labels = range(pipe.num_classes)
    wanted = None if labels is None else [int(labels[k % len(labels)]) for k in range(count)]
    parts, evaluations, refreshes = [], 0, 0
    started = time.perf_counter()
    for first in range(0, count, batch_size):
        size = min(batch_size, count - first)
        chosen = None if wanted is None else wanted[first : first + size]
        output = pipe(chosen, num_images=size, seed=seed, first_image=first, sampling=settings, output_type="np")
        parts.append((np.asarray(output.images) * 255).round().astype(np.uint8))  # type: ignore[union-attr]
        evaluations += pipe.last_run["network_evaluations"] * size
        refreshes += pipe.last_run["encoder_passes"] * size
        if on_batch is not None:
            on_batch(first + size)
    report = {
        "count": count,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 3),
        "network_evaluations": evaluations,
        "encoder_passes": refreshes,
        "sampling": to_dict(settings),
        "origin": pipe.origin,
        "versions": provenance(),
        "threads": torch.get_num_threads(),
        "device": str(pipe.device),
    }
    return Samples(np.concatenate(parts), None if wanted is None else np.asarray(wanted, np.int64), report)
