"""Pictures of a model in training: the same noise and classes or prompts each time, so that only the weights differ."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from untwine.codecs.base import Codec
from untwine.conditions.text import Text
from untwine.contracts import Condition
from untwine.data.base import Dataset
from untwine.data.loading import lines_of
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import Path
from untwine.diffusion.sampling import Sampling, sample
from untwine.training.distributed import Distributed, reshard

ROWS = 4


def prompts_in_turn(held_out: Dataset, training_set: Dataset, seed: int) -> list[str]:
    """Captions to draw, in a fixed random order: those of held-out and of training samples in turn, none twice."""
    queues = []
    for part in (held_out, training_set):
        order = Draws(seed).permutation("prompts", len(part), 0)
        queues.append(list(dict.fromkeys(lines_of(part, k)[0] for k in order)))
    turns = (prompt for pair in zip_longest(*queues) for prompt in pair if prompt is not None)
    return list(dict.fromkeys(turns))


class Drawing:
    """Draws images of a model in training; image k has the same noise and class, or prompt, each time.

    Args:
        text: encodes the ``prompts``, which come in turn, for a model of texts.
        option: of the recipe, that asks for them; named in errors.

    Raises:
        ValueError: where the samples are not pictures, or the objective has no ``path`` to sample along.
    """

    def __init__(
        self,
        dataset: Dataset,
        codec: Codec,
        path: Path | None,
        sampling: Sampling,
        *,
        seed: int,
        processes: Distributed,
        option: str,
        text: Text | None = None,
        prompts: list[str] | None = None,
    ) -> None:
        channels = codec.decoded_shape(codec.latent_shape(dataset.sample_shape))[0]
        if path is None or channels not in (1, 3) or not codec.reconstructs:
            raise ValueError(
                f"{option} needs an objective with a diffusion path and a codec that decodes to 1 or 3 "
                f"channels, got {'no path' if path is None else f'samples of {channels} channels'}; "
                "leave it out"
            )
        self.dataset, self.codec, self.path, self.sampling, self.processes = dataset, codec, path, sampling, processes
        self.draws, self.text, self.prompts = Draws(seed), text, prompts or []

    @torch.no_grad()
    def draw(self, model: Any, index: Tensor, precision: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        """The images ``index`` (B,) as (B, C, H, W) uint8; processes of a sharded model call it together."""
        condition, null = self._condition(model, index)
        shape = self.codec.latent_shape(self.dataset.sample_shape)
        training = model.training
        model.eval()
        try:
            with precision():
                latents, _ = sample(
                    model,
                    condition,
                    shape,
                    index,
                    draws=self.draws,
                    null=null,
                    sampling=self.sampling,
                    path=self.path,
                    device=self.processes.device,
                )
        finally:
            model.train(training)
            reshard(model)
        return self.codec.to_pixels(latents)

    def _condition(self, model: Any, index: Tensor) -> tuple[Condition, Condition | None]:
        """Of the images ``index``, and for texts their null."""
        if self.text is not None:
            prompts = [self.prompts[k % len(self.prompts)] for k in index.tolist()]
            return self.text.encode(prompts, cut=True), self.text.null(len(index))
        labels = index % self.dataset.num_classes if "labels" in model.accepts else None
        return Condition(labels=labels), None

    def share(self, count: int) -> Tensor:
        """The images of this process out of ``count``; every process has as many, so that the last may be surplus."""
        each = -(-count // self.processes.world_size)
        return torch.arange(each) * self.processes.world_size + self.processes.rank


class Preview:
    """A sheet of samples: a column for each of up to ten classes, which come in turn."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing, num_classes = drawing, 0 if drawing.text is not None else drawing.dataset.num_classes
        self.columns = num_classes if 2 <= num_classes <= 10 else 8

    def draw(self, model: Any, precision: Callable[[], AbstractContextManager[Any]]) -> np.ndarray:
        """The samples (N, H, W, C) uint8; collective, each process draws the same number of them."""
        count = ROWS * self.columns
        pixels = self.drawing.draw(model, self.drawing.share(count), precision)
        pixels = self.drawing.processes.gather(pixels)  # (ranks, share, C, H, W)
        return pixels.transpose(0, 1).flatten(0, 1)[:count].permute(0, 2, 3, 1).cpu().numpy()

    def sheet(self, images: np.ndarray) -> Image.Image:
        """The samples in rows, small ones enlarged, with a light line between them."""
        scale = max(1, 32 // images.shape[1])
        large = images.repeat(scale, axis=1).repeat(scale, axis=2)
        framed = np.pad(large, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=230)
        height, width, channels = framed.shape[1:]
        rows = framed.reshape(ROWS, self.columns, height, width, channels).swapaxes(1, 2)
        sheet = rows.reshape(ROWS * height, self.columns * width, channels)
        return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
