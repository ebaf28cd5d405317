"""Small representation autoencoders with random weights, saved as a user would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderRAE

from untwine.codecs.rae_features import FeatureMaps
from untwine.codecs.rae_model import RAE
from untwine.codecs.rae_siglip import nested_siglip
from untwine.config import Component
from untwine.encoders.base import Encoder

SMALL: dict[str, Any] = {
    "encoder_type": "dinov2",
    "encoder_hidden_size": 64,
    "encoder_patch_size": 7,
    "encoder_num_hidden_layers": 1,
    "encoder_input_size": 28,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
    "patch_size": 4,
}
"""4 x 4 tokens of 64 channels, pictures of 16 x 16"""
DECODER: dict[str, Any] = {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
"""of :func:`tiny_rae`"""


def save_diffusers(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A folder of diffusers' AutoencoderRAE."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with nested_siglip():
            AutoencoderRAE(**{**SMALL, **changes}).save_pretrained(folder)
    return folder


def features(*sites: str, side: int = 32) -> FeatureMaps:
    """Maps of EfficientNet-Lite0; at side 32, blocks 0, 2 and 4 have 16, 8 and 4 positions a side."""
    sites = sites or ("network._blocks.2",)
    return FeatureMaps(encoder=Component(Encoder.kinds, "efflite0", {"side": side}), sites=sites)


def tiny_rae(**changes: Any) -> RAE:
    """For the 8 x 8 x 24 map of pictures of 32 x 32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RAE(**{"representation": features(), **DECODER, **changes})


def save_encoder(folder: Path, kind: str) -> Path:
    """A vision transformer of transformers whose last norm has affine weights other than 1 and 0."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "dinov2":
            config = transformers.Dinov2WithRegistersConfig(patch_size=14, image_size=518, **sizes)
            model: Any = transformers.Dinov2WithRegistersModel(config)
            norm = model.layernorm
        elif kind == "siglip2":
            config = transformers.SiglipVisionConfig(patch_size=16, image_size=256, **sizes)
            model = transformers.SiglipVisionModel(config)
            norm = getattr(model, "vision_model", model).post_layernorm
        else:
            config = transformers.ViTMAEConfig(patch_size=14, image_size=224, **sizes)
            model = transformers.ViTMAEModel(config)
            norm = model.layernorm
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.uniform_(norm.bias, -1, 1)
    model.save_pretrained(folder)
    return folder
