"""Loss on held-out samples at fixed (image, t, noise) triples, so that two numbers of one run, or of two, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from untwine.codecs.base import Codec
from untwine.contracts import Batch, Condition
from untwine.data.base import CorruptImage, Dataset
from untwine.diffusion.draws import Draws
from untwine.training.distributed import Distributed
from untwine.training.metering import LossMeter
from untwine.training.objectives.base import Objective

MIN_TRIPLES = 512


class Validation:
    """Held-out samples, each seen at as many fixed (t, noise) pairs as it takes to make :data:`MIN_TRIPLES`.

    The draws of triple k are functions of (seed, k), and the objective runs in evaluation mode: times are uniform and
    no label is dropped. All processes share the work.
    """

    def __init__(self, dataset: Dataset, codec: Codec, *, seed: int, batch_size: int, processes: Distributed) -> None:
        self.dataset, self.codec, self.processes = dataset, codec, processes
        self.draws = Draws(seed ^ 0x76616C)  # apart from the streams of training
        self.batch_size = max(1, batch_size // processes.world_size)
        self.readable: list[int] = []
        for position in range(len(dataset)):
            try:
                dataset.read(position)
            except CorruptImage:
                continue
            self.readable.append(position)

    def __len__(self) -> int:
        """Number of triples."""
        rounds = -(-MIN_TRIPLES // len(self.readable)) if self.readable else 0
        return rounds * len(self.readable)

    def _batches(self) -> Iterator[Batch]:
        mine = list(range(self.processes.rank, len(self), self.processes.world_size))
        labels = self.dataset.labels
        device = self.processes.device
        for start in range(0, len(mine), self.batch_size):
            index = torch.tensor(mine[start : start + self.batch_size])
            positions = [self.readable[k % len(self.readable)] for k in index.tolist()]
            x = torch.stack([self.dataset.read(p) for p in positions]).to(device)
            latents = self.codec.encode(x, draws=self.draws, index=index).latents
            condition = Condition() if labels is None else Condition(labels=torch.from_numpy(labels[positions]))
            yield Batch(latents, condition.to(device), index)

    @torch.no_grad()
    def measure(
        self,
        networks: dict[str, nn.Module],
        objective: Objective,
        *,
        step: int,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, Any]:
        """Mean loss, its parts and the loss per time bin; collective."""
        meter = LossMeter(self.processes)
        training = {module: module.training for module in (*networks.values(), objective)}
        for module in training:
            module.eval()
        try:
            for batch in self._batches():
                with precision():
                    loss = objective(networks, batch, update="model", step=step, draws=self.draws)
                meter.add(loss)
            return meter.read()
        finally:
            for module, was in training.items():
                module.train(was)
