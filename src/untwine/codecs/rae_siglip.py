"""SigLIP encoders of ``AutoencoderRAE`` under transformers 5, whose vision model lost the level ``vision_model``.

diffusers takes the affine weights out of ``encoder.vision_model.post_layernorm``, and saved folders have their names
under ``encoder.vision_model.``. Both hold again where that level is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.autoencoders import autoencoder_rae
from torch import nn


class _Nested(nn.Module):
    """A vision model under the name ``vision_model``."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the vision model returns."""
        return self.vision_model(*args, **kwargs)


@contextmanager
def nested_siglip() -> Iterator[None]:
    """Within, ``AutoencoderRAE`` builds SigLIP encoders that have ``vision_model``, whatever transformers makes."""
    module: Any = autoencoder_rae
    plain = module.SiglipVisionModel

    def build(config: Any) -> nn.Module:
        model = plain(config)
        return model if hasattr(model, "vision_model") else _Nested(model)

    module.SiglipVisionModel = build
    try:
        yield
    finally:
        module.SiglipVisionModel = plain
