"""LightningDiT (arXiv 2501.01423): SiT's layout with RMSNorm, SwiGLU and rotary positions.

Three code bases have one: hustvl/LightningDiT, bytetriper/RAE (Fourier features of time) and diffusion-bench (the
condition as tokens).

Differs from the references: data is at t = 0 (hustvl's is at t = 1). Channels of a variance that is thrown away are
not computed. Modulations without shifts (``wo_shift``) load with shifts of zero. The linear head of REPA belongs to
the alignment term, not to the network. Any grid is accepted where positions are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from untwine.contracts import Condition, PredictionKind
from untwine.models.base import SingleStream
from untwine.models.conditioning import (
    IN_CONTEXT_ARGUMENTS,
    IN_CONTEXT_IGNORED,
    IN_CONTEXT_NAMES,
    MODULATED_NAMES,
    LightningBackbone,
    in_context_config,
    in_context_weights,
    modulated_config,
    patch_weights,
)
from untwine.models.layers.block import Block, Context
from untwine.models.layers.embeddings import PatchEmbedding
from untwine.models.layers.official import (
    Dialect,
    Weights,
    count_blocks,
    data_last,
    read_heads,
    read_vit,
    reversed_time,
    shifts_added,
    split_w12,
)

_SHAPE = {
    "patch_size": ("patch_size", 1),
    "in_channels": ("in_channels", 32),
    "hidden_size": ("hidden_size", 1152),
    "depth": ("depth", 28),
    "num_heads": ("num_heads", 16),
    "num_classes": ("num_classes", 1000),
}
_OPTIONS = {
    "use_qknorm": ("qk_norm", False),
    "use_swiglu": ("use_swiglu", True),
    "use_rope": ("use_rope", True),
    "use_rmsnorm": ("use_rmsnorm", True),
}


def _weights(weights: Weights, config: Any) -> Weights:
    if weights.get("blocks.0.adaln.bias", weights["time_embedder.mlp.2.bias"]).shape[0] == 4 * config.hidden_size:
        weights = shifts_added(weights)
    return patch_weights(split_w12(weights), config)


def _from_hustvl(weights: Weights, config: Any) -> Weights:
    return reversed_time(_weights(weights, config))


def _hustvl_config(ours: dict[str, Any], weights: Any) -> dict[str, Any]:
    return data_last(modulated_config(ours, weights), weights)


def _read(state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    names = "\n".join(state_dict)
    return {
        **{k: v for k, v in read_vit(state_dict, given, sizes).items() if k != "learn_sigma"},
        "use_qknorm": ".q_norm." in names,
        "use_swiglu": ".mlp.w12." in names,
        "use_rope": "feat_rope." in names,
        "use_rmsnorm": ".norm1." in names,
    }


def _read_in_context(
    state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Any]
) -> dict[str, Any]:
    width, channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
    found = {"hidden_size": width, "depth": count_blocks(state_dict), "in_channels": channels, "patch_size": patch}
    heads = read_heads(state_dict, width, sizes, rope="rope", hidden_size=width)
    return {**found, "num_heads": heads, **read_in_context(state_dict)}


def read_in_context(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the condition embedders of diffusion-bench tell of the constructor's arguments."""
    tokens = {"num_t_tokens": len(state_dict["t_embedder.learnable_tokens"])}
    found: dict[str, Any] = {"is_meanflow": "t_abs_embedder.W" in state_dict, "cond_arch": tokens}
    if "ctx_embedder.norm.weight" in state_dict:
        return {**found, "condition_type": "text", "context_dim": len(state_dict["ctx_embedder.norm.weight"])}
    tokens["num_c_tokens"] = len(state_dict["ctx_embedder.learnable_tokens"])
    num_classes = len(state_dict["ctx_embedder.embedding_table.weight"]) - 1
    return {**found, "condition_type": "label", "num_classes": num_classes}


HUSTVL_DIALECT = Dialect(
    system="lightningdit",
    arguments={**_SHAPE, **_OPTIONS},
    names={"x_embedder.": "embedder.", **MODULATED_NAMES},
    marks=("x_embedder.", "y_embedder.", "feat_rope."),
    absent=("s_embedder.", "t_embedder.W"),
    ignored=("input_size", "mlp_ratio", "class_dropout_prob", "learn_sigma", "wo_shift", "use_checkpoint"),
    dropped=("feat_rope.",),
    configure=_hustvl_config,
    convert=_from_hustvl,
    read=_read,
)
RAE_DIALECT = Dialect(
    system="rae",
    arguments={**_SHAPE, **_OPTIONS},
    names=HUSTVL_DIALECT.names,
    marks=("x_embedder.", "y_embedder.", "t_embedder.W"),
    absent=("s_embedder.",),
    ignored=(*HUSTVL_DIALECT.ignored, "use_gembed"),
    dropped=("feat_rope.",),
    configure=modulated_config,
    convert=_weights,
    read=_read,
)
BENCH_DIALECT = Dialect(
    system="ddt-head",
    arguments={**_SHAPE, **IN_CONTEXT_ARGUMENTS},
    names={"x_embedder.": "embedder.", **IN_CONTEXT_NAMES},
    marks=("x_embedder.", "t_embedder.learnable_tokens"),
    absent=("s_embedder.",),
    ignored=(*IN_CONTEXT_IGNORED, "z_dim"),
    dropped=("rope.", "repa_projector."),
    configure=in_context_config,
    convert=in_context_weights,
    read=_read_in_context,
)


class LightningDiT(LightningBackbone, SingleStream):
    """Velocity predictor of one stream, conditioned by modulation or by tokens.

    Args:
        in_channels: channels C of the sample, also of the velocity.
        hidden_size: width D, a multiple of ``4 * num_heads``.
        depth: blocks.
        num_heads: attention heads.
        patch_size: side of a square patch.
        num_classes: 0 for a model without labels.
        conditioning: "adaln" or "tokens".
        norm: "rms", or "layer" without a weight.
        qk_norm: whether each head's queries and keys are normalised.
        mlp: "swiglu" or "gelu".
        use_rope: rotary positions at the integers of the grid.
        num_positions: 0 adds sines and cosines of the position to the patches; -1 nothing; N > 0 a stored table, which
            binds the model to the square grid of N tokens.
        time_features: "sinusoid" or "fourier".
        time_scale, time_origin: the time embedding is of ``time_scale * (t - time_origin)``.
        num_time_tokens, num_label_tokens: of conditioning by tokens.
        text_dim: width of the token states in ``condition.tokens["text"]``; 0 for a model without text.
        second_time: whether ``condition.vectors["r"]`` (B, 1, 1) is the time at which a step ends (MeanFlow).
        predicts: what the output means, "velocity", "noise" or "x0".
    """

    SIZES = {  # noqa: RUF012 - a table, read only
        "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    }
    dialects = (HUSTVL_DIALECT, RAE_DIALECT, BENCH_DIALECT)

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        patch_size: int = 1,
        num_classes: int = 1000,
        conditioning: Literal["adaln", "tokens"] = "adaln",
        norm: Literal["rms", "layer"] = "rms",
        qk_norm: bool = False,
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        use_rope: bool = True,
        num_positions: int = 0,
        time_features: Literal["sinusoid", "fourier"] = "sinusoid",
        time_scale: float = 1.0,
        time_origin: float = 0.0,
        num_time_tokens: int = 4,
        num_label_tokens: int = 8,
        text_dim: int = 0,
        second_time: bool = False,
        predicts: PredictionKind = "velocity",
    ) -> None:
        super().__init__()
        self._add_trunk()
        self.embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self._initialise()

    def _block(self, index: int) -> Block:
        style = self._style(modulated=self.config.conditioning == "adaln")
        return Block(self.config.hidden_size, self.config.num_heads, style)

    def _sequence(
        self, x: Tensor, t: Tensor, time: Tensor, condition: Condition, contexts: list[Context]
    ) -> tuple[Tensor, list[Context]]:
        tokens = self._with_positions(x, self.embedder(x))
        if self.condition_embedder is None:
            return tokens, contexts
        distinct = {id(c): c for c in contexts}  # one for all blocks, but where each has its own mask
        joined = {k: self._with_condition(tokens, t, time, condition, c) for k, c in distinct.items()}
        return joined[id(contexts[0])][0], [joined[id(c)][1] for c in contexts]

    def _num_tokens(self, part: str, num_tokens: int) -> int:
        return num_tokens + self.num_condition_tokens

    def site_flops(self, num_tokens: int) -> dict[str, int]:
        """As every backbone; the head reads the tokens of the image alone."""
        found = super().site_flops(num_tokens)
        return {**found, "final_layer": self.final_layer.flops(num_tokens, 1)}
