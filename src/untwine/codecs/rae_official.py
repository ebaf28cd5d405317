"""Official decoder weights of RAE (bytetriper/RAE, ``GeneralDecoder``) by the names of diffusers' ``RAEDecoder``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

RENAMED = (
    (".attention.attention.query.", ".attention.to_q."),
    (".attention.attention.key.", ".attention.to_k."),
    (".attention.attention.value.", ".attention.to_v."),
    (".attention.output.dense.", ".attention.to_out.0."),
)
HEADS = {768: 12, 1024: 16, 1152: 16}
"""width -> heads of the published decoders (ViT-B, L, XL)"""
POSITIONS = "decoder_pos_embed"
STATISTICS = ("mean", "var")
"""of ``stat.pt``"""


def infer_official(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``GeneralDecoder``: those given, in one level or as (config, num_patches), and the weights'.

    As in the official autoencoder, ``image_size`` follows from the patches, and is read only where nothing else tells
    their number.

    Raises:
        ValueError: for weights of another network, or arguments that contradict them.
    """
    try:
        hidden, channels = state_dict["decoder_embed.weight"].shape
        outputs = state_dict["decoder_pred.bias"].shape[0]
        tokens = state_dict[POSITIONS].shape[1] - 1 if POSITIONS in state_dict else None
        layers = {name.split(".")[1] for name in state_dict if name.startswith("decoder_layers.")}
        mlp = state_dict["decoder_layers.0.intermediate.dense.bias"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"state_dict is not of an RAE decoder: it lacks {error}, and begins with {sorted(state_dict)[:5]}"
        ) from None
    told = {
        "hidden_size": channels,
        "decoder_hidden_size": hidden,
        "decoder_num_hidden_layers": len(layers),
        "decoder_intermediate_size": mlp,
        "patch_size": math.isqrt(outputs // 3),
        "num_channels": 3,
    } | ({} if tokens is None else {"num_patches": tokens})
    nested = given.get("config", {})
    asked = {**(nested if isinstance(nested, Mapping) else {}), **{k: v for k, v in given.items() if k != "config"}}
    if wrong := {k: (asked[k], v) for k, v in told.items() if asked.get(k, v) != v}:
        raise ValueError(f"config contradicts the weights (asked, there): {wrong}; correct it or leave it out")
    defaults = {"layer_norm_eps": 1e-12, "decoder_num_attention_heads": HEADS.get(hidden)}
    found = {**defaults, **asked, **told}
    if "image_size" in found:
        found.setdefault("num_patches", (found["image_size"] // found["patch_size"]) ** 2)
    if missing := [k for k in ("num_patches", "decoder_num_attention_heads") if found.get(k) is None]:
        raise ValueError(f"config: the weights do not tell {' and '.join(missing)}; give it")
    return found


def rename_official(state_dict: Mapping[str, Tensor], decoder: nn.Module) -> dict[str, Tensor]:
    """The weights for ``decoder``, complete; its fixed table of positions must be the one in the file.

    Raises:
        ValueError: for parameters that are missing, unknown or of another shape.
    """
    found: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name in STATISTICS:
            continue
        for official, ours in RENAMED:
            name = name.replace(official, ours)
        found[name] = value
    table: Tensor = decoder.decoder_pos_embed  # type: ignore[assignment]
    stored = found.pop(POSITIONS, table)
    if stored.shape != table.shape or not torch.allclose(stored.float().cpu(), table, atol=1e-4):
        raise ValueError(f"{POSITIONS} in state_dict is not the fixed sine-cosine table of {tuple(table.shape)}")
    wanted = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    have = {name: tuple(value.shape) for name, value in found.items()}
    if wrong := sorted(k for k in wanted.keys() | have.keys() if wanted.get(k) != have.get(k)):
        told = [f"{k}: expected {wanted.get(k, 'none')}, got {have.get(k, 'none')}" for k in wrong[:5]]
        raise ValueError(f"state_dict does not fit the decoder ({len(wrong)} parameters): {'; '.join(told)}")
    return found
