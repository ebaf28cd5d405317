"""Features that frozen encoders see in the clean pictures of a batch, kept per sample where samples do not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from untwine.codecs.rae_features import POOLED, FeatureMaps
from untwine.contracts import Batch
from untwine.data.base import Dataset

CLASS_TOKEN = "class_token"
"""what an encoder's one vector a picture is called, (B, z)"""
CHUNK = 16
"""pictures encoded at once, always as many: a convolution rounds differently in batches of another size"""


def names_of(maps: FeatureMaps) -> tuple[str, ...]:
    """What the features of each site are called in ``batch.features``: equal names, equal features."""
    options = ", ".join(f"{name}={value}" for name, value in maps.encoder.options.items())
    return tuple(CLASS_TOKEN if site == POOLED else f"{maps.encoder.kind}({options})/{site}" for site in maps.sites)


class FrozenFeatures:
    """Fills ``batch.features`` with tokens (B, N, z), row by row, of every site; with no maps it does nothing.

    Args:
        maps: encoders and their sites; those wanted twice are computed once.
        dataset: whose samples the batches hold. Where it does not augment them, features are kept by position.
        cache_mib: of memory for kept features, half precision; what is above is computed anew each time.

    Raises:
        ValueError: for samples that are no pictures, such as cached latents.
    """

    def __init__(self, maps: Sequence[FeatureMaps], dataset: Dataset, *, cache_mib: float = 1024.0) -> None:
        if maps and (channels := dataset.sample_shape[0]) not in (1, 3):
            raise ValueError(
                f"data: encoders need pictures of 1 or 3 channels, and these samples have {channels}; train from the "
                "pictures, not from a cache of latents"
            )
        self.maps: dict[tuple[str, ...], FeatureMaps] = {}
        for wanted in maps:
            if self.maps.setdefault(names_of(wanted), wanted) != wanted:
                raise ValueError(f"terms: two encoders for one {CLASS_TOKEN}; name the same one")
        self.budget = 0 if dataset.flip or dataset.crop == "random" else int(cache_mib * 2**20)
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def fill(self, batch: Batch, x: Tensor, positions: Sequence[int] | np.ndarray) -> Batch:
        """``batch`` with the features of its pictures ``x`` (B, 1 or 3, H, W) in [-1, 1] at ``positions``."""
        if not self.maps:
            return batch
        rows = {k: self._kept.get(int(position)) for k, position in enumerate(positions)}
        missing = [k for k, row in rows.items() if row is None]
        for k, row in zip(missing, self._encoded(x[missing])):
            rows[k] = row
            if self.budget > 0:
                self._kept[int(positions[k])] = row
                self.budget -= sum(value.nbytes for value in row)
        names = [name for names in self.maps for name in names]
        columns = zip(*(row for row in rows.values() if row is not None))
        found = {name: torch.stack(column).to(x.device).float() for name, column in zip(names, columns)}
        if CLASS_TOKEN in found:
            found[CLASS_TOKEN] = found[CLASS_TOKEN][:, 0]
        return replace(batch, features={**batch.features, **found})

    @torch.no_grad()
    def _encoded(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """The features of each picture, (N, z) float16 a site, on the host."""
        found: list[tuple[Tensor, ...]] = []
        for pictures in ((x + 1) / 2).split(CHUNK) if len(x) else ():
            filled = torch.cat((pictures, pictures[:1].expand(CHUNK - len(pictures), -1, -1, -1)))
            tokens = [v.flatten(2).transpose(1, 2).half().cpu() for m in self.maps.values() for v in m(filled)]
            found += [tuple(value[k].clone() for value in tokens) for k in range(len(pictures))]
        return found
