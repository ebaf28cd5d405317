"""Small autoencoders of diffusers with random weights, saved as a user would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

KL: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
TINY = {
    "encoder_block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [1, 1, 1],
    "num_decoder_blocks": [1, 1, 1],
}
DC = {
    "latent_channels": 4,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [8, 16],
    "decoder_block_out_channels": [8, 16],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], []],
    "scaling_factor": 0.4,
}
VIDEO = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.1, 0.2, -0.1, 0.0],
    "latents_std": [1.5, 2.0, 0.5, 1.0],
}
VQ = {"block_out_channels": [8], "norm_num_groups": 4, "num_vq_embeddings": 16, "latent_channels": 3}

CLASSES: dict[str, tuple[dict[str, Any], tuple[list[float], list[float]]]] = {
    "AutoencoderKL": (KL, ([0.0], [1 / 0.18215])),
    "AutoencoderKL shifted": ({**KL, "shift_factor": 0.25, "scaling_factor": 0.5}, ([0.25], [2.0])),
    "AutoencoderKL per channel": (
        {**KL, "scaling_factor": 0.5, "latents_mean": [0.1, 0.2, -0.1, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]},
        ([0.1, 0.2, -0.1, 0.0], [3.0, 4.0, 1.0, 2.0]),
    ),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
            "down_block_out_channels": [32],
            "up_block_out_channels": [32],
        },
        ([0.0], [1 / 0.18215]),
    ),
    "AutoencoderTiny": (TINY, ([0.0], [1.0])),
    "AutoencoderDC": (DC, ([0.0], [2.5])),
    "AutoencoderKLQwenImage": (VIDEO, (VIDEO["latents_mean"], VIDEO["latents_std"])),  # type: ignore[arg-type]
    "AutoencoderKLWan": (VIDEO, (VIDEO["latents_mean"], VIDEO["latents_std"])),  # type: ignore[arg-type]
    "VQModel": (VQ, ([0.0], [1 / 0.18215])),
}
"""class name, and which variant -> (options, (mean, std) of its normalisation)"""


def save_vae(folder: Path, name: str = "AutoencoderKL", *, seed: int = 0, **changes: Any) -> Path:
    """A model folder; the default is a small AutoencoderKL of factor 2 with the statistics of Stable Diffusion's."""
    options = CLASSES[name][0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(diffusers, name.split()[0])(**{**options, **changes}).save_pretrained(folder)
    return folder
