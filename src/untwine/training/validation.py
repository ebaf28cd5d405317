"""Loss on held-out samples at fixed (image, t, noise) triples, so that two numbers of one run, or of two, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from untwine.codecs.base import Codec
from untwine.conditions.text import Text
from untwine.contracts import Batch
from untwine.data.base import CorruptImage, Dataset
from untwine.data.features import FrozenFeatures
from untwine.data.loading import conditioned
from untwine.diffusion.draws import Draws
from untwine.training.distributed import Distributed
from untwine.training.metering import LossMeter
from untwine.training.objectives.base import Objective

MIN_TRIPLES = 512


class Validation:
    """Held-out samples, each seen at as many fixed (t, noise) pairs as it takes to make :data:`MIN_TRIPLES`.

    The draws of triple k are functions of (seed, k), and the objective runs in evaluation mode: times are uniform and
    no label or caption is dropped; of a caption of several lines the first is taken. All processes share the work.
    """

    def __init__(
        self,
        dataset: Dataset,
        codec: Codec,
        *,
        seed: int,
        batch_size: int,
        processes: Distributed,
        text: Text | None = None,
        features: FrozenFeatures | None = None,
    ) -> None:
        self.dataset, self.codec, self.processes = dataset, codec, processes
        self.text, self.features = text, features
        self.draws = Draws(seed ^ 0x76616C)  # apart from the streams of training
        self.batch_size = max(1, batch_size // processes.world_size)

    def __len__(self) -> int:
        """Number of triples; those of a corrupt sample count, but are left out."""
        size = len(self.dataset)
        return -(-MIN_TRIPLES // size) * size if size else 0

    def _batches(self) -> Iterator[tuple[Batch, int]]:
        """This process's triples, and how many there are in each batch; every process has as many batches."""
        rank, world_size = self.processes.rank, self.processes.world_size
        mine = range(rank, len(self), world_size)
        for start in range(0, -(-len(self) // world_size), self.batch_size):
            found: dict[int, Tensor] = {}
            for k in mine[start : start + self.batch_size]:
                with suppress(CorruptImage):
                    found[k] = self.dataset.read(k % len(self.dataset))
            # Sharded weights are gathered by all processes together: one that has nothing to measure runs as well.
            index = torch.tensor(list(found) or [0])
            x = torch.stack(list(found.values()) or [torch.zeros(self.dataset.sample_shape)])
            yield self._batch(x.to(self.processes.device), index), len(found)

    def _batch(self, x: Tensor, index: Tensor) -> Batch:
        latents = self.codec.encode(x, draws=self.draws, index=index).latents
        positions = (index % len(self.dataset)).numpy()
        batch = conditioned(latents, index, self.dataset, positions, self.text)
        return batch if self.features is None else self.features.fill(batch, x, positions)

    @torch.no_grad()
    def measure(
        self,
        networks: dict[str, nn.Module],
        objective: Objective,
        *,
        step: int,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, Any]:
        """Mean loss, its parts and the loss per time bin; collective.

        Raises:
            CorruptImage: where no held-out sample can be read.
        """
        meter = LossMeter(self.processes)
        training = {module: module.training for module in (*networks.values(), objective)}
        for module in training:
            module.eval()
        try:
            for batch, count in self._batches():
                with precision():
                    loss = objective(networks, batch, update="model", step=step, draws=self.draws)
                meter.add(loss, weight=count)
            values = meter.read()
        finally:
            for module, was in training.items():
                module.train(was)
        if values["loss"] is None:
            raise CorruptImage(f"none of the {len(self.dataset)} held-out samples can be read")
        return values
