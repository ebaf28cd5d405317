"""The improved DiT of the DDT paper (arXiv 2504.05741, section 4.1): its baseline, over the same block as DDT.

One embedder; time and label modulate every block and the final layer.

Differs from the reference (github.com/MCG-NJU/DDT, ``improved_dit.py``): as :mod:`untwine.models.ddt`. Its norms
multiply by their weight before rounding to the input dtype, as the reference does here and not in DDT.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from untwine.contracts import Condition, Output
from untwine.models.base import Backbone, mask_of_samples
from untwine.models.layers.block import Context
from untwine.models.layers.embeddings import PatchEmbedding, unpatchify
from untwine.models.layers.official import ARGUMENTS, PREFIXES


class ImprovedDiT(Backbone):
    """Class-conditional velocity predictor without a split; arguments as :class:`~untwine.models.ddt.DDT`."""

    SIZES = {  # noqa: RUF012 - a table, read only
        "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    }
    _scale_in_float32 = True
    _official_arguments = tuple(name for name in ARGUMENTS if name != "num_encoder_blocks")
    _official_prefixes = {**PREFIXES, "x_embedder.": "embedder."}  # noqa: RUF012

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
    ) -> None:
        super().__init__()
        self._add_trunk()
        self.embedder = PatchEmbedding(in_channels, hidden_size, patch_size)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        attention_mask: Tensor | Sequence[Tensor | None] | None = None,
        features: Collection[str] = (),
    ) -> Output:
        """The velocity of ``x`` at time t.

        Args:
            x: (B, C, H, W), H and W divisible by the patch size.
            t: (B,) in [0, 1], 0 = data, or (B, N) per token.
            condition: labels (B,), or nothing when the model has no classes.
            attention_mask: (N, N), (B, N, N) or (B, H, N, N) bool, True = attend, for all blocks; or one a block,
                where None or a missing entry masks nothing.
            features: sites (``blocks.i``) to return.
        """
        self._check_sample(x)
        self._check_features(features)
        _, embedded = self._embed_condition(x, t, condition)
        contexts = self._contexts(x, attention_mask)
        tokens, taps = self._run("trunk", self.embedder(x), embedded, contexts, features)
        patches = self.final_layer(tokens, embedded)
        return Output(unpatchify(patches, self.config.patch_size, (x.shape[2], x.shape[3])).to(x.dtype), taps)

    def _contexts(self, x: Tensor, masks: Tensor | Sequence[Tensor | None] | None) -> list[Context]:
        depth = self.config.depth
        if masks is None or isinstance(masks, Tensor):
            return [self._context(x, masks)] * depth
        if len(masks) > depth:
            raise ValueError(f"attention_mask has {len(masks)} entries for {depth} blocks; give at most one a block")
        shared, tokens = self._context(x), x.shape[2] * x.shape[3] // self.config.patch_size**2
        padded = (*masks, *[None] * (depth - len(masks)))
        heads = self.config.num_heads
        return [replace(shared, mask=mask_of_samples(mask, len(x), heads, tokens)) for mask in padded]
