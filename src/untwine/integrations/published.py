"""How the authors of each system sample for their tables: what ``untwine convert`` writes beside the weights.

Times and intervals are ours (t = 0 is data). A setting that the authors tune for each model, or that no paper states,
stays at its default: no guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from untwine.diffusion.timesteps import dimension_shift

_LAST_AS_MEAN = {"kind": "euler", "rule": "sde", "last_rule": "mean"}
_FIXED: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "ddt": {
        "ddt": {"num_inference_steps": 250, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.7], "last_step": 0.04}
    },
    "dit": {
        "dit": {
            "num_inference_steps": 250,
            "guidance_scale": 1.5,
            "guidance_channels": 3,
            "solver": {"kind": "ddpm", "variance": "learned"},
        }
    },
    "sit": {
        "sit": {
            "num_inference_steps": 250,
            "guidance_scale": 1.5,
            "guidance_channels": 3,
            "solver": {**_LAST_AS_MEAN, "weight": "sigma"},
            "last_step": 0.04,
        }
    },
    "repa": {
        "sit": {
            "num_inference_steps": 250,
            "guidance_scale": 1.8,
            "guidance_interval": [0.0, 0.7],
            "closed_interval": True,
            "solver": {**_LAST_AS_MEAN, "weight": "time"},
            "last_step": 0.04,
        }
    },
}
"""system -> network -> settings"""
PIXELS = 3
"""channels of pictures themselves"""
_WIDE = 256
"""channels from which latents are features of an encoder (768 of DINOv2-B), and not of a VAE (4 to 64)"""


def published(system: str, network: str, config: Mapping[str, Any], latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """Fields of :class:`~untwine.diffusion.sampling.Sampling`, for latents of ``latent_shape`` (C, H, W).

    Args:
        system: a key of ``untwine.integrations.official.NETWORKS``.
        network: its name in recipes.
        config: of our model.
    """
    if system == "rae":
        return _rae(latent_shape)
    if system == "ddt-head":
        return _diffusion_bench(config, latent_shape)
    if system == "umd":
        clip = {"clip_x0": 1.0} if latent_shape[0] == PIXELS else {}
        return {"num_inference_steps": 126, "solver": {"kind": "ddim", "eta": 1.0, **clip}}
    return dict(_FIXED.get(system, {}).get(network, {}))


def published_path(system: str, latent_shape: tuple[int, ...]) -> dict[str, Any] | None:
    """On which its networks are trained, for latents of ``latent_shape``; None = the linear one."""
    if system == "umd":
        return {"kind": "cosine_chain" if latent_shape[0] == PIXELS else "discrete"}
    return {"kind": "discrete"} if system == "dit" else None


def _rae(latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """50 points and so 49 steps, that end at t = 0.001 before the shift; no guidance but by a weaker model.

    arXiv 2510.11690; the interval of a guidance that is asked for has its ends in it.
    """
    return {
        "num_inference_steps": 49,
        "grid_end": 0.001,
        "shift": max(1.0, dimension_shift(latent_shape)),
        "closed_interval": True,
    }


def _diffusion_bench(config: Mapping[str, Any], latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """50 steps to t = 0, shifted but for pixels; the least of the scales that the authors tune for each model.

    arXiv 2606.24888: 1.6 to 2.0 for latents of VAEs, 4.8 to 9.0 for those of RAEs. MeanFlow takes 1 to 4 steps.
    """
    channels = latent_shape[0]
    found: dict[str, Any] = {"shift": 1.0 if channels == PIXELS else dimension_shift(latent_shape)}
    if config["second_time"]:
        return {**found, "solver": {"kind": "mean_flow"}, "num_inference_steps": 4}
    found |= {"num_inference_steps": 50, "closed_interval": True}
    if channels == PIXELS or config["text_dim"]:
        return found
    return {**found, "guidance_scale": 4.8 if channels >= _WIDE else 1.6, "guidance_interval": [0.0, 0.9]}


def grid_side(state_dict: Mapping[str, Tensor]) -> int | None:
    """Patches a side of the square grid that official weights carry a table of positions for; None without a table."""
    if "pos_embed" in state_dict:
        return isqrt(state_dict["pos_embed"].shape[1])
    table = next((value for name, value in state_dict.items() if name.endswith("rope.freqs_sin")), None)
    # Condition tokens have the angle 0, and so has the first patch.
    return None if table is None else isqrt(1 + int((table != 0).any(1).sum()))
