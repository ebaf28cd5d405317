"""Masked diffusion (UMD, arXiv 2406.17688): an auto-encoder of hidden patches and a diffusion model, in one network.

A fraction r of the samples is clean and mostly hidden, the others are noised and less hidden; M is 1 on hidden pixels:

    clean:    L0 = mean_M (x0_hat - x0)^2                                    (t = 0, without label)
    noised:   L1 = (mean_{1-M} (noise_hat - noise)^2 + mean_M (x0_hat - x0)^2) / 2;   both everywhere where M = 0
    L = (1 - r) L1 + r L0

r = 1 is MAE (arXiv 2111.06377), r = 0 with ``mask_ratio`` 0 DiT with two heads, with 0.5 MaskDiT (arXiv 2306.09305).
For generation, a trained network is tuned further with ``conditional: true``, ``clean_ratio: 0.05, mask_ratio: 0``.

Differs from the reference (github.com/philippe-eecs/small-vision): which samples are clean follows from their counter,
evenly spread, not from their place in the batch; masks, too, are functions of the counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from untwine.contracts import Batch, Condition, Loss
from untwine.diffusion.chains import CosineChain
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import Path
from untwine.diffusion.timesteps import UniformTime
from untwine.models.umd import hidden_pixels, visible_patches
from untwine.training.objectives.flow_matching import FlowMatching

NOISED, CLEAN = ("noise", "x0"), ("reconstruction",)
"""parts of both losses"""


def masked_error(sample: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """(B,) mean squared error in float32, where ``mask`` (B, 1, H, W) is 1; None = everywhere."""
    error = (sample.float() - target).square()
    if mask is None:
        return error.flatten(1).mean(1)
    return (error * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) * error.shape[1])


class MaskedDiffusion(FlowMatching):
    """For ``model: {kind: umd, hides_patches: true}``; each part of a micro-batch is one model call.

    Args:
        path: of the noised samples; the published one is the cosine chain for pixels, ``discrete`` for latents.
        clean_ratio: fraction r of clean samples, in [0, 1].
        mask_ratio, clean_mask_ratio: fraction of hidden patches of noised and of clean samples, in [0, 1).
        conditional: whether the noised samples are given their labels; if not, the model learns without any.
        label_dropout: as :class:`FlowMatching`.
    """

    def __init__(
        self,
        *,
        path: Path = CosineChain(),  # noqa: B008 - a frozen value
        clean_ratio: float = 0.5,
        mask_ratio: float = 0.375,
        clean_mask_ratio: float = 0.75,
        conditional: bool = False,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__(path=path, time=UniformTime(), label_dropout=label_dropout)
        if not 0 <= clean_ratio <= 1:
            raise ValueError(f"clean_ratio must be within [0, 1], got {clean_ratio}")
        for name, value in {"mask_ratio": mask_ratio, "clean_mask_ratio": clean_mask_ratio}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be within [0, 1), got {value}")
        self.clean_ratio, self.mask_ratio, self.clean_mask_ratio = clean_ratio, mask_ratio, clean_mask_ratio
        self.conditional = conditional

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        model = networks["model"]
        self._check(model)
        is_clean, ratio, size = self.is_clean(batch.index), self.clean_ratio, len(batch.x0)
        kinds = (1 - ratio, ~is_clean, NOISED, self._denoise), (ratio, is_clean, CLEAN, self._reconstruct)
        total, parts, nothing = torch.zeros((), device=batch.x0.device), {}, batch.x0.new_zeros(0)
        per_sample = times = None
        for share, chosen, names, errors_of in kinds:
            if share == 0:
                continue
            given = batch.select(chosen)
            errors, t = errors_of(model, given, draws) if chosen.any() else ((nothing,) * len(names), nothing)
            loss = torch.stack(errors).mean(0)
            total = total + (loss if given.weight is None else loss * given.weight).sum() / size
            # Of so many samples on average, so that all micro-batches and processes report the same parts.
            parts |= {name: error.detach().sum() / (size * share) for name, error in zip(names, errors)}
            if names is NOISED:
                per_sample, times = loss.detach(), t
        return Loss(total, parts, per_sample, times)

    def is_clean(self, index: Tensor) -> Tensor:
        """(B,) bool by sample counter: of any n in a row, ``n clean_ratio`` up to one."""
        place = index.double()
        return ((place + 1) * self.clean_ratio).floor() > (place * self.clean_ratio).floor()

    def condition(self, model: Any, batch: Batch, draws: Draws) -> Condition:
        """As of flow matching; nothing but null unless ``conditional``."""
        return super().condition(model, batch, draws) if self.conditional else model.null(batch.condition)

    def _denoise(self, model: Any, batch: Batch, draws: Draws) -> tuple[tuple[Tensor, ...], Tensor]:
        """The errors of noise and of x0, (B,) each, and the times."""
        draw = self.draw(model, batch, draws)
        visible, hidden = self._mask(model, batch, draws, self.mask_ratio)
        output = model(draw.x_t, draw.t, draw.condition, visible=visible)
        of_noise = masked_error(output.sample, draw.noise, None if hidden is None else 1 - hidden)
        of_x0 = masked_error(output.extra["x0"], draw.x0, hidden)
        return (of_noise, of_x0), draw.t

    def _reconstruct(self, model: Any, batch: Batch, draws: Draws) -> tuple[tuple[Tensor, ...], Tensor]:
        """The error of x0 (B,), and the times."""
        visible, hidden = self._mask(model, batch, draws, self.clean_mask_ratio)
        t = torch.zeros(len(batch.x0), device=batch.x0.device)
        output = model(batch.x0, t, model.null(batch.condition), visible=visible)
        return (masked_error(output.extra["x0"], batch.x0, hidden),), t

    def _mask(self, model: Any, batch: Batch, draws: Draws, ratio: float) -> tuple[Tensor | None, Tensor | None]:
        """The visible patches (B, K) and the hidden pixels (B, 1, H, W); None where nothing is hidden."""
        if ratio == 0:
            return None, None
        size, patch = (batch.x0.shape[2], batch.x0.shape[3]), model.config.patch_size
        shape = (size[0] // patch * (size[1] // patch),)
        noise = draws.uniform("visible", shape, batch.index, device=batch.x0.device)
        visible = visible_patches(noise, ratio)
        return visible, hidden_pixels(visible, size, patch)

    def _check(self, model: Any) -> None:
        if "hides_patches" not in getattr(model, "config", {}):
            raise ValueError("masked_diffusion needs a model of two heads whose patches can be hidden: a umd")
        hides = (self.clean_ratio < 1 and self.mask_ratio > 0) or (self.clean_ratio > 0 and self.clean_mask_ratio > 0)
        if hides and not model.config.hides_patches:
            raise ValueError("masked_diffusion hides patches, which needs model.hides_patches: true")
