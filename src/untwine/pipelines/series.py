"""A series of images from one pipeline, drawn batch by batch: in memory here, on disk in :mod:`.writing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from untwine.acceleration.sharing.plan import SharingPlan
from untwine.config import to_dict
from untwine.contracts import StepInfo, check_labels
from untwine.diffusion.draws import Draws
from untwine.diffusion.sampling import Sampling
from untwine.pipelines.image import ImagePipeline, provenance
from untwine.pipelines.loading import load
from untwine.pipelines.text_to_image import TextToImagePipeline


@dataclass(frozen=True)
class Samples:
    """Generated images with what is needed to make them again."""

    images: np.ndarray
    """(N, H, W, C) uint8; float32 latents (N, C, H, W) where the pipeline has no codec for pictures"""
    labels: np.ndarray | None
    """(N,) int64"""
    report: dict[str, Any]
    """seconds, network evaluations, settings, seed, versions"""
    prompts: list[str] | None = None
    """one per image, of a model of texts"""

    @property
    def are_pictures(self) -> bool:
        return self.images.dtype == np.uint8


@dataclass(frozen=True)
class Drawn:
    """One batch of a series."""

    images: np.ndarray
    """as in :class:`Samples`"""
    evaluations: int
    """of the network, summed over the images"""
    refreshes: int
    """of the encoder state, likewise"""


class Series:
    """``count`` images of one request, which is checked before anything is computed.

    Batch b holds the images ``[b * batch_size, (b + 1) * batch_size)``. Whoever draws it, and after whichever others,
    its images are the same, bit for bit on one kind of machine.

    Args:
        pipe: what draws.
        count: images.
        labels: one per image, or fewer, repeated in turn; default: all classes.
        prompts: likewise, for a model of texts; default: those that its checkpoint carries as examples.
        negative_prompt: what guidance leads away from, instead of the empty prompt.
        size: (height, width) in pixels, where it differs from the training size.
        sampling: all settings; ``changes`` are single fields of it, such as ``guidance_scale=2.0``.
        plan: a sharing plan or its file (``untwine accelerate``), which brings all settings.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        pipe: ImagePipeline,
        *,
        count: int = 16,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        size: tuple[int, int] | None = None,
        sampling: Sampling | None = None,
        plan: SharingPlan | str | Path | None = None,
        **changes: Any,
    ) -> None:
        _check_positive(count=count, batch_size=batch_size)
        Draws(seed), pipe.shape_for(size)  # refused here where they are wrong
        self.pipe, self.count, self.seed, self.batch_size, self.size = pipe, count, seed, batch_size, size
        self.settings = pipe.settings(sampling, plan, **changes)
        self.takes_text, self.negative_prompt = isinstance(pipe, TextToImagePipeline), negative_prompt
        wanted = (_prompts if self.takes_text else _labels)(pipe, labels, prompts, negative_prompt)
        self.wanted = None if wanted is None else np.resize(wanted, count)
        """(N,) the label or the prompt of each image"""

    def __len__(self) -> int:
        """Batches."""
        return -(-self.count // self.batch_size)

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.takes_text else self.wanted

    @property
    def prompts(self) -> list[str] | None:
        return list(self.wanted) if self.takes_text and self.wanted is not None else None

    def images_of(self, batch: int) -> range:
        """Which images a batch holds."""
        first = batch * self.batch_size
        return range(first, min(first + self.batch_size, self.count))

    def draw(self, batch: int, *, on_step: Callable[[StepInfo, Tensor], bool | None] | None = None) -> Drawn:
        """The images of one batch; ``on_step`` hears each solver step, and ends it by an exception."""
        held = self.images_of(batch)
        request: dict[str, Any] = {"seed": self.seed, "sampling": self.settings, "size": self.size, "on_step": on_step}
        request |= {"negative_prompt": self.negative_prompt} if self.takes_text else {}
        wanted = None if self.wanted is None else self.wanted[held.start : held.stop].tolist()
        request |= {"num_images": len(held)} if wanted is None else {}
        images = _draw(self.pipe, wanted, first_image=held.start, **request)
        run = self.pipe.last_run
        return Drawn(images, run["network_evaluations"] * len(held), run["encoder_passes"] * len(held))

    def told(self) -> dict[str, Any]:
        """Everything that determines the images, as JSON values."""
        pipe = self.pipe
        told = {
            "count": self.count,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sampling": to_dict(self.settings),
            "space": "pixels" if pipe.makes_pictures else "latents",
            "origin": pipe.origin,
            "dtype": str(pipe.dtype).removeprefix("torch."),
        }
        told |= {} if self.size is None else {"size": list(self.size)}
        return told | ({"prompts": self.prompts, "negative_prompt": self.negative_prompt} if self.takes_text else {})

    def report(self, evaluations: int, refreshes: int, seconds: float) -> dict[str, Any]:
        """What was drawn, at which cost, where."""
        return {
            **self.told(),
            "seconds": round(seconds, 3),
            "network_evaluations": evaluations,
            "encoder_passes": refreshes,
            "versions": provenance(),
            "threads": torch.get_num_threads(),
            "device": str(self.pipe.device),
        }


def sample(
    source: str | Path | ImagePipeline = "ddt-digits", *, on_batch: Callable[[int], None] | None = None, **request: Any
) -> Samples:
    """Images in memory; without labels the classes come in turn, and image k is the same for every batch size.

    Args:
        source: anything :func:`~untwine.pipelines.loading.load` takes, or a pipeline.
        on_batch: hears how many images are done.
        request: of :class:`Series`: ``count=16, labels, prompts, negative_prompt, seed=0, batch_size=64, size,
            sampling, plan``, and single settings such as ``guidance_scale=2.0``.

    Raises:
        ValueError: for a value out of range, before anything is computed.
    """
    series = Series(source if isinstance(source, ImagePipeline) else load(source), **request)
    parts: list[Drawn] = []
    started = time.perf_counter()
    for batch in range(len(series)):
        parts.append(series.draw(batch))
        if on_batch is not None:
            on_batch(series.images_of(batch).stop)
    costs = (sum(part.evaluations for part in parts), sum(part.refreshes for part in parts))
    report = series.report(*costs, time.perf_counter() - started)
    return Samples(np.concatenate([part.images for part in parts]), series.labels, report, series.prompts)


def _check_positive(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _labels(pipe: ImagePipeline, labels: Sequence[int] | None, *texts: str | Sequence[str] | None) -> np.ndarray | None:
    """The labels that come in turn, checked all at once."""
    if any(text is not None for text in texts):
        instead = "give labels" if pipe.num_classes else "it is unconditional"
        raise ValueError(f"prompts: this {type(pipe.model).__name__} takes no text; {instead}")
    if labels is not None and not len(labels):
        raise ValueError("labels must name at least one class, got none; leave them out to draw all classes in turn")
    if labels is None:
        return np.arange(pipe.num_classes) if pipe.num_classes else None
    return check_labels(labels, pipe.num_classes).numpy() if pipe.num_classes else np.asarray(labels)


def _prompts(pipe: Any, labels: Any, prompts: Sequence[str] | None, negative: str | None) -> np.ndarray:
    """The prompts that come in turn, checked all at once."""
    if labels is not None:
        raise ValueError(f"labels: this {type(pipe.model).__name__} is conditioned on texts; give prompts instead")
    found = pipe.example_prompts if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
    if not found:
        raise ValueError("prompts must be at least one text; this checkpoint carries no examples to draw instead")
    pipe.text.encode([*found, negative or ""])
    return np.asarray(found, dtype=object)


def _draw(pipe: ImagePipeline, wanted: list[Any] | None, **request: Any) -> np.ndarray:
    if not pipe.makes_pictures:
        return pipe(wanted, output_type="latent", **request).images.cpu().numpy()  # type: ignore[union-attr]
    images = pipe(wanted, output_type="np", **request).images  # type: ignore[union-attr]
    return (np.asarray(images) * 255).round().astype(np.uint8)
