"""Class-conditional and unconditional images from one backbone and its codec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

import untwine
from untwine.acceleration.sharing.plan import SharingPlan, as_plan
from untwine.codecs.base import Codec
from untwine.config import from_dict
from untwine.contracts import Condition, StepInfo, check_labels
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import Path
from untwine.diffusion.sampling import Sampling, sample

OutputType = Literal["pil", "np", "pt", "latent"]


class _Parts:
    """The values of a pipeline's config, built strictly like a recipe's."""

    def __init__(self, *, codec: Codec, path: Path, sampling: Sampling) -> None:
        self.codec, self.path, self.sampling = codec, path, sampling


class ImagePipeline(DiffusionPipeline):
    """Images from a backbone: ``pipe(class_labels=[3, 7], guidance_scale=2.0).images``.

    Everything besides the weights is plain data in ``model_index.json``.

    Args:
        model: a backbone of :mod:`untwine.models`.
        codec: ``{"kind": ..., ...}`` of the codec the model was trained in.
        path: ``{"kind": ..., ...}`` of the diffusion path.
        sampling: default settings, the fields of :class:`~untwine.diffusion.sampling.Sampling`.
        latent_shape: (C, H, W) of one latent.
        class_names: for models with classes.
        origin: where the weights come from: recipe, step, averages.
    """

    model_cpu_offload_seq = "model"
    model: Any

    def __init__(
        self,
        model: ModelMixin,
        codec: dict[str, Any] | None = None,
        path: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        latent_shape: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = {
            "codec": codec or {"kind": "identity"},
            "path": path or {"kind": "linear"},
            "sampling": sampling or {},
        }
        parts = from_dict(_Parts, config, "model_index")
        self.codec, self.path, self.sampling = parts.codec, parts.path, parts.sampling
        shape = latent_shape or (model.config["in_channels"], 32, 32)
        self.latent_shape: tuple[int, ...] = tuple(shape)
        self.class_names = list(class_names or [])
        self.origin = dict(origin or {})
        self.register_modules(model=model)
        # The public name of the class, not the module it happens to live in today.
        self.register_to_config(model=("untwine", type(model).__name__))
        rest = {"latent_shape": list(shape), "class_names": self.class_names, "origin": self.origin}
        self.register_to_config(**config, **rest)
        self.last_run: dict[str, int] = {}
        """of the last finished call: evaluations of the network and of its encoder, per image"""

    @property
    def num_classes(self) -> int:
        """0 for an unconditional model."""
        return int(self.model.config.get("num_classes", 0)) if self.model.accepts else 0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one decoded sample."""
        return self.codec.sample_shape(self.latent_shape)

    @property
    def makes_pictures(self) -> bool:
        """False where samples have other than 1 or 3 channels: latents of an image codec that is not part of this."""
        return self.sample_shape[0] in (1, 3)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        *,
        num_images: int | None = None,
        seed: int | None = None,
        first_image: int = 0,
        sampling: Sampling | None = None,
        size: tuple[int, int] | None = None,
        refresh: Sequence[int] | None = None,
        plan: SharingPlan | str | FilePath | None = None,
        on_step: Callable[[StepInfo, Tensor], bool | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images; image k is a function of (seed, first_image + k, label, settings), whatever the batch.

        Args:
            class_labels: one per image, in [0, num_classes); default: the classes in turn.
            guidance_scale: 1 = none; default: the pipeline's settings.
            num_inference_steps: solver steps, >= 1; default: the pipeline's settings.
            generator: its *seed* is taken, not its state; a list gives each image its own.
            output_type: ``pil``, ``np`` (B, H, W, C) float in [0, 1], ``pt`` (B, C, H, W) in [0, 1] or ``latent``.
            num_images: without labels, how many; default 1.
            seed: instead of a generator; default 0.
            first_image: counter of the first image, so that a long run can be made in parts.
            sampling: all settings at once.
            size: (height, width) in pixels, where it differs from the training size.
            refresh: steps at which a decoupled backbone recomputes its encoder state.
            plan: a sharing plan or its file, which brings all settings; those given must be the ones it was made for.
            on_step: hears each step; returning False cancels.

        Raises:
            ValueError: for labels, sizes, seeds or settings out of range, before anything is computed.
        """
        return self._generate(
            *self._request(class_labels, num_images, first_image),
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            seed=seed,
            sampling=sampling,
            size=size,
            refresh=refresh,
            plan=plan,
            on_step=on_step,
        )

    def _generate(
        self,
        index: Tensor,
        condition: Condition,
        null: Condition | None = None,
        *,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        seed: int | None = None,
        sampling: Sampling | None = None,
        size: tuple[int, int] | None = None,
        refresh: Sequence[int] | None = None,
        plan: SharingPlan | str | FilePath | None = None,
        on_step: Callable[[StepInfo, Tensor], bool | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """The images ``index`` (B,) under ``condition``, guided away from ``null`` (default: the model's own).

        Everything else is as in :meth:`__call__`.
        """
        self._check_output(output_type)
        changes = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        changes = {name: value for name, value in changes.items() if value is not None}
        settings = self.settings(sampling, plan, refresh=refresh, **changes)
        latents, guided = sample(
            self.model,
            condition,
            self.shape_for(size),
            index,
            draws=_draws(generator, seed, len(index)),
            null=null,
            sampling=settings,
            path=self.path,
            on_step=on_step,
            device=self._execution_device,
        )
        self.last_run = {"network_evaluations": guided.num_evaluations, "encoder_passes": guided.num_refreshes}
        images = latents if output_type == "latent" else self.to_images(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]

    def settings(
        self,
        sampling: Sampling | None = None,
        plan: SharingPlan | str | FilePath | None = None,
        *,
        refresh: Sequence[int] | None = None,
        **changes: Any,
    ) -> Sampling:
        """The settings that a call with these arguments would have.

        Raises:
            ValueError: for a plan that was made for another sampler or other weights, or given beside ``refresh``.
        """
        if refresh is not None and plan is not None:
            raise ValueError("give refresh or plan, not both: a plan names the steps itself")
        if plan is not None:
            return as_plan(plan).settings(self.model, sampling, **changes)
        chosen = {} if refresh is None else {"refresh": tuple(refresh)}
        return replace(sampling or self.sampling, **chosen, **changes)

    def to_images(self, latents: Tensor, output_type: OutputType = "pil") -> Any:
        """Decoded and rounded to 8 bits, in the requested form."""
        pixels = self.codec.to_pixels(latents)
        if output_type == "pt":
            return pixels.float() / 255
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return array.astype(np.float32) / 255 if output_type == "np" else [to_pil(image) for image in array]

    def _check_output(self, output_type: str) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if output_type != "latent" and not self.makes_pictures:
            raise ValueError(
                f"output_type {output_type!r} needs an image codec, and this pipeline has none for its latents of "
                f"{self.sample_shape[0]} channels; use output_type='latent'"
            )

    def shape_for(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        """(C, H, W) of the latents for images of ``size`` pixels, within what the model can do."""
        if size is None:
            return self.latent_shape
        if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
            raise ValueError(f"size must be (height, width), two integers >= 1, got {size}")
        shape = self.codec.latent_shape((self.sample_shape[0], *size))
        patch, (height, width) = self.model.config.get("patch_size", 1), shape[1:]
        if height % patch or width % patch:
            near = self.codec.sample_shape((shape[0], *(max(1, round(n / patch)) * patch for n in (height, width))))
            raise ValueError(f"size {tuple(size)} does not divide into patches; the nearest that does is {near[1:]}")
        if self.model.square_only and height != width:
            raise ValueError(f"size must be square for {type(self.model).__name__}, got {tuple(size)}")
        limit, tokens = self.model.max_tokens, height * width // patch**2
        if limit is not None and tokens > limit:
            raise ValueError(f"size {tuple(size)} makes {tokens} tokens; {type(self.model).__name__} takes {limit}")
        return shape

    def _request(
        self, class_labels: int | Sequence[int] | Tensor | None, num_images: int | None, first_image: int
    ) -> tuple[Tensor, Condition]:
        """Counters and condition of the requested images."""
        if class_labels is not None and not self.num_classes:
            raise ValueError(
                f"class_labels must be left out: this {type(self.model).__name__} is unconditional, got {class_labels}"
            )
        labels = None if class_labels is None else torch.as_tensor(class_labels)
        if labels is not None and labels.ndim == 0:
            labels = labels.expand(1 if num_images is None else num_images)
        count = len(labels) if labels is not None else 1 if num_images is None else num_images
        if count < 1 or num_images not in (None, count) or first_image < 0:
            raise ValueError(
                "num_images must be >= 1 and equal the number of class_labels, and first_image >= 0; "
                f"got num_images={num_images}, {count} labels, first_image={first_image}"
            )
        index = torch.arange(first_image, first_image + count)
        if labels is None:
            return index, self.in_turn(index)[0]
        return index, Condition(labels=check_labels(labels, self.num_classes))

    def in_turn(self, index: Tensor) -> tuple[Condition, Condition | None]:
        """What image k is conditioned on by default: class ``k mod num_classes``. Its null is the model's own."""
        return Condition(labels=index % self.num_classes if self.num_classes else None), None


class _PerImage:
    """Draws of images that each have a seed of their own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.each = [Draws(seed) for seed in seeds]

    def normal(self, name: str, shape: Sequence[int], index: Any, *, device: Any = None) -> Tensor:
        return torch.cat([draws.normal(name, shape, [0]) for draws in self.each]).to(device or "cpu")


def _draws(generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | None, count: int) -> Any:
    if generator is None:
        return Draws(0 if seed is None else seed)
    if seed is not None:
        raise ValueError("give seed or generator, not both")
    if isinstance(generator, torch.Generator):
        return Draws(generator.initial_seed())
    if len(generator) != count:
        raise ValueError(f"generator: a list must have one per image, got {len(generator)} for {count} images")
    return _PerImage([g.initial_seed() for g in generator])


def to_pil(image: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 as a picture; one channel is grey."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def provenance() -> dict[str, str]:
    """Versions that a saved result names."""
    return {"untwine": untwine.__version__, "torch": torch.__version__}
