"""Backbones over LightningDiT's block, which take their condition as modulation or as tokens in the context.

``conditioning="adaln"``: time and label modulate each block (LightningDiT, arXiv 2501.01423; RAE, arXiv 2510.11690).
``conditioning="tokens"``: they stand as tokens after those of the image and only attention sees them, so that a block
costs a third less (DiffusionBench, arXiv 2606.24888). A text can stand there in place of the label.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from untwine.contracts import Condition
from untwine.models.base import Backbone
from untwine.models.layers.block import Context, FinalLayer, Style
from untwine.models.layers.embeddings import (
    ConditionTokens,
    FourierTimeEmbedding,
    PositionEmbedding,
    TimestepEmbedding,
)
from untwine.models.layers.official import Weights, channels_first, flat_patches, fused_qkv, stored_positions
from untwine.models.layers.rope import Rope, grid_positions, rope_tables, with_unrotated


class LightningBackbone(Backbone):
    """What the single stream and the decoupled backbone of this family share; it reads their registered config."""

    _keep_in_fp32_modules = ["frequencies"]  # noqa: RUF012 - the name and type are diffusers'

    def _add_trunk(self) -> None:
        c = self.config
        if c.conditioning not in ("adaln", "tokens"):
            raise ValueError(f"conditioning must be 'adaln' or 'tokens', got {c.conditioning!r}")
        if c.conditioning == "adaln" and (c.text_dim or c.second_time):
            raise ValueError("text_dim and second_time need conditioning='tokens', got conditioning='adaln'")
        if c.text_dim and c.num_classes:
            raise ValueError(f"num_classes must be 0 for a model of text, got {c.num_classes}; text replaces the label")
        super()._add_trunk()
        self.position_embedder = PositionEmbedding(c.hidden_size, c.num_positions) if c.num_positions >= 0 else None
        if c.num_positions > 0:
            self.square_only, self.max_tokens = True, c.num_positions
        self.condition_embedder = self._condition_tokens() if c.conditioning == "tokens" else None
        self.second_time_embedder = self._time_embedder() if c.second_time else None
        named = {"labels": c.num_classes, "tokens.text": c.text_dim, "vectors.r": c.second_time}
        self.accepts = frozenset(key for key, wanted in named.items() if wanted)

    def _condition_tokens(self) -> ConditionTokens:
        c = self.config
        return ConditionTokens(
            c.hidden_size,
            num_time_tokens=c.num_time_tokens,
            num_label_tokens=c.num_label_tokens if c.num_classes else 0,
            text_dim=c.text_dim,
            second_time=c.second_time,
        )

    def _initialise(self) -> None:
        """Every block starts as the identity."""
        self._zero_modulations()

    def _time_embedder(self) -> TimestepEmbedding:
        c = self.config
        if c.time_features == "fourier":
            return FourierTimeEmbedding(c.hidden_size, scale=c.time_scale, origin=c.time_origin)
        return TimestepEmbedding(c.hidden_size, scale=c.time_scale, origin=c.time_origin, max_period=10000.0)

    def _style(self, *, modulated: bool) -> Style:
        c = self.config
        qk_norm = c.norm if c.qk_norm else "none"
        return Style(norm=c.norm, qk_norm=qk_norm, mlp=c.mlp, bias=True, modulated=modulated)

    def _final_layer(self, hidden_size: int) -> FinalLayer:
        modulated = self.config.conditioning == "adaln" or self.decoupled
        return FinalLayer(hidden_size, self.num_outputs * self.config.patch_size**2, self._style(modulated=modulated))

    def _rope(self, height: int, width: int, head_dim: int, device: torch.device) -> Rope | None:
        if not self.config.use_rope:
            return None
        return rope_tables(grid_positions(height, width, device=device), head_dim, interleaved=False)

    @property
    def num_condition_tokens(self) -> int:
        """Tokens of time and label that stand after the image's; a text's come on top."""
        c = self.config
        if c.conditioning == "adaln":
            return 0
        return c.num_time_tokens * (1 + c.second_time) + (c.num_label_tokens if c.num_classes else 0)

    def flops(self, sample_shape: tuple[int, ...], num_text_tokens: int = 0) -> int:
        """As every backbone, with the second time, and texts of so many tokens."""
        c, found = self.config, super().flops(sample_shape)
        found += 2 * c.hidden_size * (self.time_embedder.frequency_dim + c.hidden_size) * bool(c.second_time)
        if not num_text_tokens:
            return found
        part, indices = next(iter(self.parts.items()))  # the encoder, or all there is
        length = self._num_tokens(part, math.prod(sample_shape[1:]) // c.patch_size**2)
        for i in indices:
            found += self.flops_at(f"blocks.{i}", length + num_text_tokens) - self.flops_at(f"blocks.{i}", length)
        return found + 2 * num_text_tokens * c.text_dim * c.hidden_size

    def null(self, condition: Condition, keys: Any = None) -> Condition:
        """As every backbone; a text's null is the encoded empty prompt, which the caller has, and r has none."""
        return super().null(condition, self.accepts & {"labels"} if keys is None else keys)

    def _embed_condition(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        if self.condition_embedder is None:
            return super()._embed_condition(x, t, condition)
        if t.shape != (len(x),):
            raise ValueError(f"t must be ({len(x)},) where time is a token, got {tuple(t.shape)}")
        self.check_condition(condition)
        if condition.labels is not None and condition.labels.shape != (len(x),):
            raise ValueError(f"condition.labels must be ({len(x)},), got {tuple(condition.labels.shape)}")
        end = condition.vectors.get("r")
        time = self.time_embedder(t if end is None else t - end.reshape(len(x)))
        return time, time

    def _with_condition(
        self, tokens: Tensor, t: Tensor, time: Tensor, condition: Condition, context: Context
    ) -> tuple[Tensor, Context]:
        """The sequence (B, N + L, D) with what stands after the image, and its context."""
        if self.condition_embedder is None:
            return tokens, context
        label = second = None
        if self.label_embedder is not None and condition.labels is not None:
            label = self.label_embedder(condition.labels)
        if self.second_time_embedder is not None:
            second = self.second_time_embedder(t)
        extra, real = self.condition_embedder(condition, time, label, second)
        count, num_tokens = extra.shape[1], tokens.shape[1] + extra.shape[1]
        rope = None if context.rope is None else with_unrotated(context.rope, count)
        known = num_tokens - count if context.mask is None else context.mask.shape[-1]
        around = (num_tokens - count - known, count) * 2  # what stands before the image, and after it
        mask = None if context.mask is None else F.pad(context.mask, around, value=True)
        if real is not None:
            keys = F.pad(real, (num_tokens - count, 0), value=True)[:, None, None].expand(-1, 1, num_tokens, -1)
            mask = keys if mask is None else mask & keys
        return torch.cat((tokens, extra.to(tokens.dtype)), 1), Context(rope, mask)

    def _with_positions(self, x: Tensor, tokens: Tensor) -> Tensor:
        return tokens if self.position_embedder is None else self.position_embedder(tokens, *self._grid(x))


# What the official code bases of the family have in common.

POSITIONS = ("num_positions", 32)
MODULATED_NAMES = {
    "t_embedder.W": "time_embedder.frequencies",
    "t_embedder.": "time_embedder.",
    "y_embedder.embedding_table.": "label_embedder.table.",
    "pos_embed": "position_embedder.table",
    "final_layer.norm_final.": "final_layer.norm.",
    "adaLN_modulation.1.": "adaln.",
}
IN_CONTEXT_NAMES = {
    "t_embedder.learnable_tokens": "condition_embedder.time.tokens",
    "t_embedder.W": "time_embedder.frequencies",
    "t_embedder.": "time_embedder.",
    "t_abs_embedder.learnable_tokens": "condition_embedder.second_time.tokens",
    "t_abs_embedder.W": "second_time_embedder.frequencies",
    "t_abs_embedder.": "second_time_embedder.",
    "ctx_embedder.learnable_tokens": "condition_embedder.label.tokens",
    "ctx_embedder.embedding_table.": "label_embedder.table.",
    "ctx_embedder.": "condition_embedder.text.",
    "final_layer.norm_final.": "final_layer.norm.",
    "final_layer.cls_linear.": "class_layer.",
    "adaln_modulation.1.": "adaln.",
}
IN_CONTEXT_ARGUMENTS = {
    "condition_type": ("condition_type", "label"),
    "context_dim": ("text_dim", 0),
    "cond_arch": ("cond_arch", {}),
    "is_meanflow": ("second_time", False),
}
IN_CONTEXT_IGNORED = (
    "input_size", "mlp_ratio", "class_dropout_prob", "enable_repa", "repa_layer_depth", "learn_sigma",
)  # fmt: skip


def patch_weights(weights: Weights, config: Any) -> Weights:
    """Patch layers as ours, positions that we compute left out."""
    found = {k: v for k, v in weights.items() if k != "position_embedder.table" or config.num_positions > 0}
    return channels_first(
        flat_patches(found), config.patch_size, config.in_channels, ("final_layer.linear", "base_layer.linear")
    )


def in_context_weights(weights: Weights, config: Any) -> Weights:
    """Weights of diffusion-bench: separate q, k, v; its SwiGLU calls w2 what we call w3."""
    swapped = {".mlp.w2.": ".mlp.w3.", ".mlp.w3.": ".mlp.w2."}
    found: Weights = {}
    for name, weight in weights.items():
        old = next((fragment for fragment in swapped if fragment in name), None)
        found[name if old is None else name.replace(old, swapped[old])] = weight
    return patch_weights(fused_qkv(found), config)


def modulated_config(ours: dict[str, Any], weights: Any) -> dict[str, Any]:
    """The options of LightningDiT's official constructors in our words."""
    found = dict(ours)
    use_positions = found.pop("use_positions", True)
    table = stored_positions(weights["pos_embed"]) if "pos_embed" in weights else 0
    rms, swiglu = found.pop("use_rmsnorm"), found.pop("use_swiglu")
    return {
        **found,
        "norm": "rms" if rms else "layer",
        "mlp": "swiglu" if swiglu else "gelu",
        "num_positions": table if use_positions else -1,
        "time_features": "fourier" if "t_embedder.W" in weights else "sinusoid",
        "conditioning": "adaln",
    }


def in_context_config(ours: dict[str, Any], weights: Any) -> dict[str, Any]:
    """The options of diffusion-bench's constructors in our words.

    Raises:
        ValueError: for a kind of condition that it does not have.
    """
    found = dict(ours)
    kind, tokens = found.pop("condition_type"), found.pop("cond_arch")
    if kind not in ("label", "text"):
        raise ValueError(f"condition_type must be 'label' or 'text', got {kind!r}")
    found["text_dim" if kind == "label" else "num_classes"] = 0
    return {
        **found,
        "num_time_tokens": tokens.get("num_t_tokens", 4),
        "num_label_tokens": tokens.get("num_c_tokens", 8),
        "qk_norm": True,
        "num_positions": -1,
        "time_features": "fourier",
        "conditioning": "tokens",
    }
