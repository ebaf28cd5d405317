"""The official code bases of the DDT head: bytetriper/RAE and End2End-Diffusion/diffusion-bench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from untwine.models.conditioning import (
    IN_CONTEXT_ARGUMENTS,
    IN_CONTEXT_IGNORED,
    IN_CONTEXT_NAMES,
    MODULATED_NAMES,
    in_context_config,
    in_context_weights,
    modulated_config,
    patch_weights,
)
from untwine.models.layers.official import Dialect, Weights, count_blocks, known_size, split_w12
from untwine.models.lightningdit import read_in_context

_ARGUMENTS = {
    "patch_size": ("patch_size", 1),
    "in_channels": ("in_channels", 768),
    "hidden_size": ("hidden_size", (1152, 2048)),
    "depth": ("depth", (28, 2)),
    "num_heads": ("num_heads", (16, 16)),
    "num_classes": ("num_classes", 1000),
}
_NAMES = {"s_embedder.": "encoder_embedder.", "x_embedder.": "decoder_embedder.", "s_projector.": "state.1."}


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _parts(ours: dict[str, Any]) -> dict[str, Any]:
    """The official (encoder, head) pairs as our arguments."""
    widths, depths, heads, patches = (_pair(ours[k]) for k in ("hidden_size", "depth", "num_heads", "patch_size"))
    if patches[0] != patches[1]:
        raise ValueError(f"patch_size must be equal for encoder and head, got {list(patches)}")
    return {
        **ours,
        "hidden_size": widths[0],
        "decoder_hidden_size": widths[1],
        "depth": sum(depths),
        "encoder_depth": depths[0],
        "num_heads": heads[0],
        "decoder_num_heads": heads[1],
        "patch_size": patches[0],
    }


def _rae_config(ours: dict[str, Any], weights: Any) -> dict[str, Any]:
    return modulated_config(_parts(ours), weights)


def _bench_config(ours: dict[str, Any], weights: Any) -> dict[str, Any]:
    found = in_context_config(_parts(ours), weights)
    found["class_token_dim"] *= bool(found.pop("enable_reg"))
    return found


def _rae_weights(weights: Weights, config: Any) -> Weights:
    return patch_weights(split_w12(weights), config)


def _read_parts(state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Widths, depths and heads of both parts; of equal widths the split must be given, or the size be published."""
    encoder, channels, patch, _ = state_dict["s_embedder.proj.weight"].shape
    decoder = len(state_dict["x_embedder.proj.weight"])
    depth = count_blocks(state_dict)
    tables = ("enc_feat_rope", "dec_feat_rope") if "enc_feat_rope.freqs_cos" in state_dict else ("enc_rope", "dec_rope")
    heads = [w // state_dict[f"{k}.freqs_cos"].shape[1] for w, k in zip((encoder, decoder), tables)]
    found: dict[str, Any] = {
        "hidden_size": [encoder, decoder],
        "num_heads": heads,
        "in_channels": channels,
        "patch_size": patch,
    }
    if "depth" not in given:
        found["depth"] = _read_depth(state_dict, encoder, decoder, depth, sizes)
    return found


def _read_depth(
    state_dict: Mapping[str, Tensor], encoder: int, decoder: int, depth: int, sizes: Mapping[str, Any]
) -> list[int]:
    if "t_embedder.learnable_tokens" in state_dict:  # only the head is modulated
        split = sum(f"blocks.{i}.adaln_modulation.1.weight" not in state_dict for i in range(depth))
    elif encoder != decoder:
        split = sum(len(state_dict[f"blocks.{i}.attn.proj.bias"]) == encoder for i in range(depth))
    elif (known := known_size(sizes, hidden_size=encoder, decoder_hidden_size=decoder, depth=depth)) is not None:
        split = known["encoder_depth"]
    else:
        raise ValueError(
            f"depth is not in the weights: {depth} blocks of one width {encoder} may be split anywhere; give it in "
            "config as [encoder, head]"
        )
    return [split, depth - split]


def _read_rae(state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    names = "\n".join(state_dict)
    return {
        **_read_parts(state_dict, given, sizes),
        "num_classes": len(state_dict["y_embedder.embedding_table.weight"]) - 1,
        "use_qknorm": ".q_norm." in names,
        "use_swiglu": ".mlp.w12." in names,
        "use_rmsnorm": ".norm1." in names,
        "use_pos_embed": "pos_embed" in state_dict,
    }


def _read_bench(state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    found = {**_read_parts(state_dict, given, sizes), **read_in_context(state_dict)}
    if "final_layer.cls_linear.weight" in state_dict:
        found |= {"enable_reg": True, "z_dim": len(state_dict["final_layer.cls_linear.weight"])}
    if "base_final_layer.linear.weight" in state_dict and "base_model_depth" not in given:
        raise ValueError("base_model_depth is not in the weights; give it in config (diffusion-bench's default is 8)")
    return found


RAE_DIALECT = Dialect(
    system="rae",
    arguments={
        **_ARGUMENTS,
        "use_qknorm": ("qk_norm", False),
        "use_swiglu": ("use_swiglu", True),
        "use_rope": ("use_rope", True),
        "use_rmsnorm": ("use_rmsnorm", True),
        "use_pos_embed": ("use_positions", True),
    },
    names={**_NAMES, **MODULATED_NAMES},
    marks=("s_embedder.", "t_embedder.W", "y_embedder."),
    ignored=("input_size", "mlp_ratio", "class_dropout_prob", "wo_shift"),
    dropped=("enc_feat_rope.", "dec_feat_rope."),
    configure=_rae_config,
    convert=_rae_weights,
    read=_read_rae,
)
BENCH_DIALECT = Dialect(
    system="ddt-head",
    arguments={
        **_ARGUMENTS,
        **IN_CONTEXT_ARGUMENTS,
        "base_model_depth": ("base_depth", 0),
        "enable_reg": ("enable_reg", False),
        "z_dim": ("class_token_dim", 768),
    },
    names={
        **_NAMES,
        "base_final_layer.": "base_layer.",
        "cls_in_proj_enc.": "class_encoder_embedder.0.",
        "cls_in_norm_enc.": "class_encoder_embedder.1.",
        "cls_in_proj_dec.": "class_decoder_embedder.0.",
        "cls_in_norm_dec.": "class_decoder_embedder.1.",
        **IN_CONTEXT_NAMES,
    },
    marks=("s_embedder.", "t_embedder.learnable_tokens"),
    ignored=IN_CONTEXT_IGNORED,
    dropped=("enc_rope.", "dec_rope.", "repa_projector."),
    configure=_bench_config,
    convert=in_context_weights,
    read=_read_bench,
)
