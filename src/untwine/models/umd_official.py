"""UMD's official checkpoints: flax's tree with its names joined by "/", in flax's layouts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from untwine.models.layers.official import Dialect, Weights, fused_qkv


def _configured(ours: dict[str, Any], weights: Any) -> dict[str, Any]:
    """The official arguments in our words."""
    found = dict(ours)
    patch, size = found["patch_size"], found.pop("img_size")
    patch = patch if isinstance(patch, int) else patch[0]
    return {
        **found,
        "patch_size": patch,
        "num_positions": (size // patch) ** 2,
        "num_classes": found["num_classes"] or 0,
        "conditioning": "adaln" if found["conditioning"] else "tokens",
        "hides_patches": True,
    }


def _read(weights: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The official arguments, all of which the shapes tell."""
    flat = unstacked(weights)
    patch, _, channels, width = flat["embedding/kernel"].shape
    blocks = {name.split("/Multi")[0]: w for name, w in flat.items() if name.endswith("query/kernel")}
    table = flat.get("label_emb/embedding/embedding")
    return {
        "channels": channels,
        "img_size": math.isqrt(flat["pos_embedding"].shape[1]) * patch,
        "patch_size": patch,
        "width": width,
        "depth": sum(name.startswith("Encoder/") for name in blocks),
        "dec_depth": sum(name.startswith("Decoder/") for name in blocks),
        "num_heads": next(iter(blocks.values())).shape[1],
        "adaln": "final_modulation/kernel" in flat,
        "num_classes": None if table is None else len(table) - 1,
        "num_cls": flat["cls"].shape[1],
    }


_BLOCK = re.compile(r"(Encoder|Decoder)/\w*Encoder1DBlock_(\d+)/(.+)")
_LAYERS = {
    "embedding/": "embedder.proj.",
    "time_trunk/Dense_0/": "time_embedder.trunk.0.",
    "time_trunk/Dense_1/": "time_embedder.trunk.2.",
    "label_trunk/Dense_0/": "label_embedder.trunk.0.",
    "label_trunk/Dense_1/": "label_embedder.trunk.2.",
    "Encoder/encoder_norm/": "encoder_norm.",
    "Decoder/encoder_norm/": "final_layer.norm.",
    "final_modulation/": "final_layer.adaln.",
    "final_conv/": "final_layer.linear.",
}
_TABLES = {
    "pos_embedding": "encoder_positions.table.weight",
    "dec_pos_embedding": "decoder_positions.table.weight",
    "label_emb/embedding/embedding": "label_embedder.table.weight",
    "cls": "class_tokens",
    "image_mask_embedding": "mask_token",
}
_IN_BLOCK = {
    "Dense_0/": "adaln.",
    "LayerNorm_0/": "norm1.",
    "LayerNorm_1/": "norm2.",
    "MlpBlock_0/Dense_0/": "mlp.fc1.",
    "MlpBlock_0/Dense_1/": "mlp.fc2.",
    **{f"MultiHeadDotProductAttention_0/{name}/": f"attn.{name[0]}." for name in ("query", "key", "value")},
    "MultiHeadDotProductAttention_0/out/": "attn.proj.",
}


def unstacked(weights: Mapping[str, Tensor]) -> Weights:
    """Blocks that a scan keeps under one name, depth first, as ``Encoder1DBlock_i`` each."""
    found: Weights = {}
    for name, weight in weights.items():
        match = _BLOCK.fullmatch(name)
        norm = None if match is None else weights.get(name.removesuffix(match[3]) + "LayerNorm_0/scale")
        if match is None or norm is None or norm.ndim == 1:
            found[name] = weight
        else:
            found |= {f"{match[1]}/Encoder1DBlock_{i}/{match[3]}": part for i, part in enumerate(weight)}
    return found


def from_flax(weights: Mapping[str, Tensor], config: Any) -> Weights:
    """Weights by flax's names in its layouts as ours; a name that is not known stays as it is."""
    found: Weights = {}
    for name, weight in unstacked(weights).items():
        match = _BLOCK.fullmatch(name)
        table, rest, prefix = (
            (_LAYERS, name, "") if match is None else (_IN_BLOCK, match[3], _block_name(match, config))
        )
        layer, _, kind = rest.rpartition("/")
        if name in _TABLES:
            found[_TABLES[name]] = weight.squeeze(0) if name != "image_mask_embedding" else weight.flatten()
        elif f"{layer}/" in table and kind in ("kernel", "scale", "bias"):
            ours = prefix + table[f"{layer}/"] + ("bias" if kind == "bias" else "weight")
            found[ours] = _layout(layer, kind, weight, config)
        else:
            found[name] = weight
    return fused_qkv(found)


def _block_name(match: re.Match[str], config: Any) -> str:
    return f"blocks.{int(match[2]) + (config.depth if match[1] == 'Decoder' else 0)}."


def _layout(layer: str, kind: str, weight: Tensor, config: Any) -> Tensor:
    """A kernel (in, out) transposed; in and out of attention are (heads, head width), those of patches (p, p, C)."""
    if layer == "final_conv":  # transposed, and applied with both spatial axes reversed
        if kind == "bias":
            return weight.repeat_interleave(config.patch_size**2)
        return weight.flip(0, 1).permute(3, 0, 1, 2).flatten(0, 2).contiguous()
    if kind != "kernel":
        return weight.flatten()
    if layer == "embedding":
        return weight.permute(3, 2, 0, 1).flatten(1).contiguous()
    if weight.ndim == 3:
        weight = weight.flatten(0, 1) if layer.endswith("/out") else weight.flatten(1)
    return weight.T.contiguous()


DIALECT = Dialect(
    system="umd",
    arguments={
        "channels": ("in_channels", 3),
        "img_size": ("img_size", 64),
        "patch_size": ("patch_size", 4),
        "width": ("hidden_size", 768),
        "depth": ("depth", 12),
        "dec_depth": ("decoder_depth", 4),
        "num_heads": ("num_heads", 12),
        "num_classes": ("num_classes", None),
        "num_cls": ("num_class_tokens", 4),
        "adaln": ("conditioning", False),
    },
    names={},
    marks=("image_mask_embedding", "dec_pos_embedding", "Decoder/"),
    ignored=("mlp_dim", "dropout", "scan", "remat_policy", "dtype_mm", "cfg_dropout_rate", "no_decay_list"),
    configure=_configured,
    convert=from_flax,
    read=_read,
)
