"""SiT (arXiv 2401.08740): DiT's network as a velocity predictor in continuous time.

Differs from the references: data is at t = 0 (github.com/willisma/SiT has it at t = 1; github.com/sihyun-yu/REPA and
github.com/vvvvvjdy/SRA, whose SiT load as well, at t = 0). The channels that SiT predicts for a variance and throws
away are not computed. The projectors of REPA and SRA belong to their terms, not to the network.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from untwine.contracts import PredictionKind
from untwine.models.dit import DIT_DIALECT, STYLE, VIT_ARGUMENTS, DiT, vit_weights, with_positions
from untwine.models.layers.block import Block
from untwine.models.layers.embeddings import TimestepEmbedding
from untwine.models.layers.official import Dialect, Weights, reversed_time

logger = logging.getLogger(__name__)


def _reversed(ours: dict[str, Any], weights: Any) -> dict[str, Any]:
    return {**with_positions(ours, weights), "time_origin": 1.0}


def _from_sit(weights: Weights, config: Any) -> Weights:
    return reversed_time(vit_weights(weights, config))


REPA_DIALECT = Dialect(
    system="repa",
    arguments={**VIT_ARGUMENTS, "qk_norm": ("qk_norm", False)},
    names=DIT_DIALECT.names,
    marks=(*DIT_DIALECT.marks, "projectors."),
    absent=("s_embedder.", "feat_rope.", "t_embedder.W"),
    ignored=(
        *DIT_DIALECT.ignored, "learn_sigma", "path_type", "decoder_hidden_size", "encoder_depth", "use_cfg", "z_dims",
        "projector_dim", "fused_attn",
    ),
    dropped=("projectors.",),
    configure=with_positions,
    convert=vit_weights,
    read=DIT_DIALECT.read,
)  # fmt: skip


def _from_sra(weights: Weights, config: Any) -> Weights:
    """Without the projector, which served training alone."""
    head = [name for name in weights if name.startswith("ap_head.")]
    if head:
        logger.info("left out, since they served training alone: %s", ", ".join(head))
    return vit_weights({name: weight for name, weight in weights.items() if name not in head}, config)


SRA_DIALECT = replace(
    REPA_DIALECT,
    system="sra",
    marks=(*DIT_DIALECT.marks, "ap_head."),
    absent=(*REPA_DIALECT.absent, "projectors."),
    ignored=(*REPA_DIALECT.ignored, "use_alignment_head", "attention_separation"),
    dropped=(),
    convert=_from_sra,
)


class SiT(DiT):
    """Class-conditional velocity predictor; arguments as :class:`~untwine.models.dit.DiT`, and:

    Args:
        qk_norm: LayerNorm on each head's queries and keys.
        time_scale, time_origin: the time embedding is of ``time_scale * (t - time_origin)``.
    """

    predicts = "velocity"
    dialects = (
        replace(
            DIT_DIALECT,
            system="sit",
            arguments=VIT_ARGUMENTS,
            ignored=(*DIT_DIALECT.ignored, "learn_sigma"),
            configure=_reversed,
            convert=_from_sit,
        ),
        REPA_DIALECT,
        SRA_DIALECT,
    )

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
        qk_norm: bool = False,
        num_positions: int = 0,
        time_scale: float = 1.0,
        time_origin: float = 0.0,
        predicts: PredictionKind = "velocity",
    ) -> None:
        super(DiT, self).__init__()
        self._add_trunk()
        self._initialise()

    def _time_embedder(self) -> TimestepEmbedding:
        c = self.config
        return TimestepEmbedding(c.hidden_size, scale=c.time_scale, origin=c.time_origin, max_period=10000.0)

    def _embed_time(self, t: Tensor) -> Tensor:
        return self.time_embedder(t)

    def _block(self, index: int) -> Block:
        style = replace(STYLE, qk_norm="layer" if self.config.qk_norm else "none")
        return Block(self.config.hidden_size, self.config.num_heads, style)

    @property
    def num_outputs(self) -> int:
        return self.config.in_channels
