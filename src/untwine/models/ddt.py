"""Decoupled Diffusion Transformer (arXiv 2504.05741): a large condition encoder, a small velocity decoder.

The encoder reads ``x_t``, t and the label and yields one state per token, ``silu(time + h)``. The decoder embeds
``x_t`` afresh and is modulated, token by token, by that state alone: it never sees t or the label. The state changes
slowly along a trajectory, so most sampling steps can reuse it and run the decoder only.

Differs from the reference (github.com/MCG-NJU/DDT): data is at t = 0 and noise at t = 1, so the velocity has the
other sign (:meth:`DDT.from_official` moves both into the weights and the config); a head's width must be divisible by
4; t may also be given per token.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import nn

from untwine.contracts import PredictionKind
from untwine.models.decoupled import Decoupled
from untwine.models.layers.embeddings import PatchEmbedding
from untwine.models.layers.official import DDT_DIALECT


class DDT(Decoupled):
    """Class-conditional velocity predictor with a reusable encoder state.

    Args:
        in_channels: channels C of the sample, also of the velocity.
        hidden_size: width D, a multiple of ``4 * num_heads``.
        depth: encoder and decoder blocks together.
        encoder_depth: how many of them are the encoder, in [1, depth - 1].
        num_heads: attention heads.
        patch_size: side of a square patch.
        num_classes: 0 for an unconditional model, which accepts no condition.
        time_scale, time_origin: the time embedding is of ``time_scale * (t - time_origin)``.
        time_max_period: longest period of the time embedding.
        predicts: what the output means, "velocity", "noise" or "x0".
    """

    SIZES = {  # noqa: RUF012 - a table, read only
        "B": {"hidden_size": 768, "depth": 12, "encoder_depth": 8, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "encoder_depth": 20, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "encoder_depth": 22, "num_heads": 16},
    }
    dialects = (DDT_DIALECT,)

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        encoder_depth: int = 22,
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
        self.encoder_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.decoder_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.state = nn.SiLU()
