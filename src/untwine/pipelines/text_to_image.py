"""Images from texts: a backbone, its codec, and the frozen text encoder that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from untwine.conditions.text import Text
from untwine.config import from_dict
from untwine.contracts import Condition
from untwine.pipelines.image import ImagePipeline, OutputType


class _Parts:
    """The values of the pipeline's config that are its own."""

    def __init__(self, *, condition: Text) -> None:
        self.text = condition


class TextToImagePipeline(ImagePipeline):
    """Images from prompts: ``pipe("a smiling cat", guidance_scale=3.0).images``.

    The text encoder is not part of a saved pipeline. Its config and the hash of its weights are; it is looked for when
    the first prompt comes.

    Args:
        model, codec, path, sampling, latent_shape, class_names, origin: as
            :class:`~untwine.pipelines.image.ImagePipeline`.
        condition: ``{"kind": "text", "encoder": ..., ...}``, the fields of :class:`~untwine.conditions.text.Text`.
        text_encoder: folder of the text encoder, where it lies elsewhere than ``condition`` says.
    """

    def __init__(
        self,
        model: ModelMixin,
        codec: dict[str, Any] | None = None,
        path: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        latent_shape: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        origin: dict[str, Any] | None = None,
        condition: dict[str, Any] | None = None,
        text_encoder: str | Path | None = None,
    ) -> None:
        super().__init__(model, codec, path, sampling, latent_shape, class_names, origin)
        if "tokens.text" not in self.model.accepts:
            raise ValueError(
                f"model: this {type(model).__name__} takes no text; it accepts {sorted(self.model.accepts)}"
            )
        located = {} if text_encoder is None else {"encoder": str(text_encoder)}
        condition = {"kind": "text", **(condition or {}), **located}
        self.text = from_dict(_Parts, {"condition": condition}, "model_index").text
        self.register_to_config(condition=condition)

    @property
    def num_classes(self) -> int:
        """0: the condition is a text."""
        return 0

    @property
    def example_prompts(self) -> list[str]:
        """Some of the captions that the model was trained, or held out, with."""
        return list(self.origin.get("prompts", ()))

    def in_turn(self, index: Tensor) -> tuple[Condition, Condition | None]:
        """The example prompts in turn, and the empty prompt."""
        if not self.example_prompts:
            raise ValueError("prompts: this checkpoint names no example prompts; give prompts")
        prompts = [self.example_prompts[k % len(self.example_prompts)] for k in index.tolist()]
        return self.text.encode(prompts, cut=True), self.text.null(len(prompts))

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        *,
        num_images_per_prompt: int = 1,
        first_image: int = 0,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws the images of each prompt; image k is a function of (seed, first_image + k, prompt, settings).

        Args:
            prompt: one, or several, whose images follow one another.
            negative_prompt: what guidance leads away from instead of the empty prompt: one for all, or one a prompt.
                Without guidance (scale 1) it changes nothing.
            guidance_scale, num_inference_steps, generator, output_type, return_dict: as of
                :class:`~untwine.pipelines.image.ImagePipeline`.
            num_images_per_prompt: of other noise each.
            first_image: counter of the first image, so that a long run can be made in parts.
            options: seed, sampling, size, refresh, plan and on_step, as there.

        Raises:
            ValueError: for a prompt that is too long, a text encoder that cannot be found or is not the one of the
                training, and whatever ImagePipeline refuses; before any image is computed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if not prompts or num_images_per_prompt < 1 or first_image < 0:
            raise ValueError(
                "prompt must be at least one, num_images_per_prompt >= 1 and first_image >= 0, got "
                f"{prompt!r}, {num_images_per_prompt} and {first_image}"
            )
        if negative is not None and len(negative) != len(prompts):
            raise ValueError(f"negative_prompt must be one, or one a prompt, got {len(negative)} for {len(prompts)}")
        text, each = self.text.to(self._execution_device), num_images_per_prompt
        condition = text.encode([p for p in prompts for _ in range(each)])
        null = text.encode([p for p in negative or [""] * len(prompts) for _ in range(each)])
        return self._generate(
            torch.arange(first_image, first_image + len(prompts) * each),
            condition,
            null,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            **options,
        )
