"""DiT (arXiv 2212.09748) and the improved DiT of the DDT paper: one residual stream, modulated by time and label.

:class:`DiT`: LayerNorm, tanh GELU, fixed sine-cosine positions, modulations that start at zero; it predicts the noise
on a chain of discrete levels and, with ``learn_sigma``, the logits of the variance.

:class:`ImprovedDiT` is the improved DiT of the DDT paper (arXiv 2504.05741, section 4.1): its baseline, over the same
block as DDT.

Differs from the references: DiT (github.com/facebookresearch/DiT) takes t in [0, 1] and finds the level itself; labels
are dropped by the objective, not by the model; any grid is accepted. The improved DiT (github.com/MCG-NJU/DDT,
``improved_dit.py``) differs as :mod:`untwine.models.ddt` does; its norms multiply by their weight before rounding to
the input dtype, as the reference does here and not in DDT.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from untwine.contracts import Condition, Output, PredictionKind
from untwine.models.base import SingleStream
from untwine.models.layers.block import Block, Context, FinalLayer, Style
from untwine.models.layers.embeddings import PatchEmbedding, PositionEmbedding, TimestepEmbedding
from untwine.models.layers.official import (
    IMPROVED_DIT_DIALECT,
    PREFIXES,
    Dialect,
    Weights,
    channels_first,
    flat_patches,
    read_vit,
    stored_positions,
)
from untwine.models.layers.rope import Rope


class ImprovedDiT(SingleStream):
    """Class-conditional velocity predictor without a split; arguments as :class:`~untwine.models.ddt.DDT`."""

    SIZES = {  # noqa: RUF012 - a table, read only
        "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    }
    dialects = (IMPROVED_DIT_DIALECT,)

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        patch_size: int = 2,
        num_classes: int = 1000,
        time_scale: float = 1.0,
        time_origin: float = 0.0,
        time_max_period: float = 10.0,
        predicts: PredictionKind = "velocity",
    ) -> None:
        super().__init__()
        self._add_trunk()
        self.embedder = PatchEmbedding(in_channels, hidden_size, patch_size)

    def _block(self, index: int) -> Block:
        return Block(self.config.hidden_size, self.config.num_heads, Style(scale_in_float32=True))


STYLE = Style(norm="layer", qk_norm="none", mlp="gelu", bias=True)
VIT_ARGUMENTS = {
    "input_size": ("num_positions", 32),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 4),
    "hidden_size": ("hidden_size", 1152),
    "depth": ("depth", 28),
    "num_heads": ("num_heads", 16),
    "num_classes": ("num_classes", 1000),
}
VIT_NAMES = {
    **PREFIXES,
    "x_embedder.": "embedder.",
    "pos_embed": "position_embedder.table",
    "adaLN_modulation.1.": "adaln.",
}


def with_positions(ours: dict[str, Any], weights: Any) -> dict[str, Any]:
    """Keeps a position table of the weights that is not the one that we compute."""
    return {**ours, "num_positions": stored_positions(weights["pos_embed"]) if "pos_embed" in weights else 0}


def vit_weights(weights: Weights, config: Any) -> Weights:
    """Weights of DiT's layout by our names, without positions that we compute and with channels first in patches."""
    found = {k: v for k, v in weights.items() if k != "position_embedder.table" or config.num_positions > 0}
    channels = config.in_channels * (2 if config.get("learn_sigma") else 1)
    return channels_first(flat_patches(found), config.patch_size, channels)


DIT_DIALECT = Dialect(
    system="dit",
    arguments={**VIT_ARGUMENTS, "learn_sigma": ("learn_sigma", True)},
    names=VIT_NAMES,
    marks=("pos_embed", "x_embedder.", "adaLN_modulation.1.", ".mlp.fc1."),
    absent=("s_embedder.", "feat_rope.", "t_embedder.W", "projectors.", "blocks.0.norm1."),
    ignored=("mlp_ratio", "class_dropout_prob"),
    configure=with_positions,
    convert=vit_weights,
    read=read_vit,
)


class DiT(SingleStream):
    """Class-conditional noise predictor of T discrete levels: level k is t = (k + 1) / T.

    Args:
        in_channels: channels C of the sample.
        hidden_size: width D, a multiple of 4 and of ``num_heads``.
        depth: blocks.
        num_heads: attention heads.
        patch_size: side of a square patch.
        num_classes: 0 for an unconditional model, which accepts no condition.
        learn_sigma: whether ``Output.extra["variance"]`` (B, C, H, W) is predicted as well: in [-1, 1], the place of
            log variance between the posterior's and beta.
        num_timesteps: levels T of the chain.
        num_positions: tokens of a stored position table, which binds the model to one square grid; 0 for sines and
            cosines, on any grid.
        predicts: what the output means, "noise", "velocity" or "x0".
    """

    predicts = "noise"
    SIZES = {  # noqa: RUF012 - a table, read only
        "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
        **ImprovedDiT.SIZES,
    }
    dialects = (DIT_DIALECT,)
    _width_divisor = 1

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        patch_size: int = 2,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        num_timesteps: int = 1000,
        num_positions: int = 0,
        predicts: PredictionKind = "noise",
    ) -> None:
        super().__init__()
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
        self._add_trunk()
        self._initialise()

    def _add_trunk(self) -> None:
        super()._add_trunk()
        c = self.config
        self.embedder = PatchEmbedding(c.in_channels, c.hidden_size, c.patch_size)
        self.position_embedder = PositionEmbedding(c.hidden_size, c.num_positions)
        if c.num_positions:
            self.square_only, self.max_tokens = True, c.num_positions

    def _initialise(self) -> None:
        """Xavier-uniform linear layers without bias; every block starts as the identity."""
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in self.time_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
        self._zero_modulations()

    def _time_embedder(self) -> TimestepEmbedding:
        return TimestepEmbedding(self.config.hidden_size, scale=1.0, origin=0.0, max_period=10000.0)

    def _embed_time(self, t: Tensor) -> Tensor:
        return self.time_embedder((torch.round(t.float() * self.config.num_timesteps) - 1).clamp(min=0))

    def _block(self, index: int) -> Block:
        return Block(self.config.hidden_size, self.config.num_heads, STYLE)

    def _final_layer(self, hidden_size: int) -> FinalLayer:
        return FinalLayer(hidden_size, self.num_outputs * self.config.patch_size**2, STYLE)

    @property
    def num_outputs(self) -> int:
        return self.config.in_channels * (2 if self.config.learn_sigma else 1)

    def _rope(self, height: int, width: int, head_dim: int, device: torch.device) -> Rope | None:
        return None

    def _sequence(
        self, x: Tensor, t: Tensor, time: Tensor, condition: Condition, contexts: list[Context]
    ) -> tuple[Tensor, list[Context]]:
        return self.position_embedder(self.embedder(x), *self._grid(x)), contexts

    def _output(self, x: Tensor, patches: Tensor, features: dict[str, Tensor]) -> Output:
        out = super()._output(x, patches, features)
        if self.num_outputs == self.config.in_channels:
            return out
        sample, variance = out.sample.chunk(2, 1)
        return replace(out, sample=sample, extra={"variance": variance})
