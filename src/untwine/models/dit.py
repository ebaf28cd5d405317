"""The improved DiT of the DDT paper (arXiv 2504.05741, section 4.1): its baseline, over the same block as DDT.

One embedder; time and label modulate every block and the final layer.

Differs from the reference (github.com/MCG-NJU/DDT, ``improved_dit.py``): as :mod:`untwine.models.ddt`. Its norms
multiply by their weight before rounding to the input dtype, as the reference does here and not in DDT.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from untwine.models.base import SingleStream
from untwine.models.layers.block import Block, Style
from untwine.models.layers.embeddings import PatchEmbedding
from untwine.models.layers.official import IMPROVED_DIT_DIALECT


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
    ) -> None:
        super().__init__()
        self._add_trunk()
        self.embedder = PatchEmbedding(in_channels, hidden_size, patch_size)

    def _block(self, index: int) -> Block:
        return Block(self.config.hidden_size, self.config.num_heads, Style(scale_in_float32=True))
