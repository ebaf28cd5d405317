"""The order of training, and the loader that follows it.

Counter c stands for the c-th sample that training ever sees. It fixes everything about it: epoch ``c // n``, position
``permutation(epoch)[c % n]``, augmentation and noise. Update u with global batch G consumes counters [uG, (u+1)G), cut
first into micro-batches, then by rank, in contiguous pieces. So neither world size, accumulation nor worker processes
change what an update sees, and resuming needs only the number of the update.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from untwine.codecs.base import Codec
from untwine.contracts import Batch, Condition, check_labels
from untwine.data.base import CorruptImage, Dataset
from untwine.diffusion.draws import Draws

logger = logging.getLogger(__name__)


class Order:
    """Positions in a data set of ``size`` samples by sample counter; each epoch is a permutation."""

    def __init__(self, draws: Draws, size: int) -> None:
        self.draws, self.size = draws, size
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __call__(self, counter: int) -> int:
        epoch, place = divmod(counter, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self.draws.permutation("order", self.size, epoch)
        return int(self._permutation[place])


class Loader:
    """Training data, update by update: iterating yields the list of micro-batches of each update, without end.

    Args:
        dataset: what to read. A corrupt sample is replaced by the next one that can be read; above the fraction
            ``dataset.max_corrupt`` the loader stops.
        codec: encodes the samples, in this process and on ``device``.
        seed: of the order and of augmentation.
        batch_size: samples per update, over all ranks and micro-batches.
        accumulation: micro-batches per update.
        device: of the batches; ``index`` stays on the host, where random draws are made.
        num_workers: processes that read ahead; 0 reads in this one. The batches are the same.
        start_update: the first update to yield.

    Raises:
        ValueError: for an empty data set, labels out of range, and a batch size that cannot be divided.
    """

    def __init__(
        self,
        dataset: Dataset,
        codec: Codec,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        start_update: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(dataset):
            raise ValueError("dataset is empty; nothing to train on")
        _check_division(batch_size, accumulation, world_size, rank)
        if dataset.labels is not None:
            check_labels(torch.from_numpy(dataset.labels), dataset.num_classes)
        self.dataset, self.codec = dataset, codec
        self.draws = Draws(seed)
        self.batch_size, self.accumulation, self.rank, self.world_size = batch_size, accumulation, rank, world_size
        self.num_workers, self.start_update = num_workers, start_update
        self.device = torch.device(device)
        self.corrupt: dict[int, str] = {}
        """position -> what is wrong there, for every corrupt sample met"""

    def __iter__(self) -> Iterator[list[Batch]]:
        reader = _Reader(self.dataset, self.draws)
        loader = DataLoader(
            reader,
            batch_sampler=self._counters(),  # type: ignore[arg-type]  (any iterable serves)
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # else it would draw from the global one
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_one_thread,
        )
        micro: list[Batch] = []
        for read in self._guarded(loader):
            micro.append(self._batch(*read))
            if len(micro) == self.accumulation:
                yield micro
                micro = []

    def counters(self, update: int) -> list[list[int]]:
        """The sample counters of this rank in one update, by micro-batch."""
        size = self.batch_size // (self.accumulation * self.world_size)
        starts = (update * self.batch_size + (m * self.world_size + self.rank) * size for m in range(self.accumulation))
        return [list(range(start, start + size)) for start in starts]

    def _counters(self) -> Iterator[list[int]]:
        for update in itertools.count(self.start_update):
            yield from self.counters(update)

    def _guarded(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[int, str]]]:
        """The loader's items; a dead worker ends the run with a message, and too many corrupt samples with a list."""
        last = "before the first sample"
        items = iter(loader)
        while True:
            try:
                item = next(items)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error) or "Caught" in str(error):
                    raise
                raise RuntimeError(
                    f"a data worker died {last}: {error} "
                    "If the system ran out of memory, use fewer workers (num_workers) or a smaller batch_size."
                ) from error
            self._note(item[-1])
            last = f"after sample {int(item[1][-1])}"
            yield item

    def _note(self, bad: dict[int, str]) -> None:
        for position, reason in bad.items():
            if position not in self.corrupt:
                logger.warning("corrupt sample replaced by the next one: %s", reason)
                self.corrupt[position] = reason
        if len(self.corrupt) > self.dataset.max_corrupt * len(self.dataset):
            listed = "\n  ".join(list(self.corrupt.values())[:20])
            raise CorruptImage(
                f"{len(self.corrupt)} of {len(self.dataset)} samples are corrupt, more than max_corrupt = "
                f"{self.dataset.max_corrupt} allows; repair or remove them:\n  {listed}"
            )

    def _batch(self, x: Tensor, index: Tensor, positions: Tensor, bad: dict[int, str]) -> Batch:
        labels = self.dataset.labels
        condition = Condition() if labels is None else Condition(labels=torch.from_numpy(labels)[positions])
        x = x.to(self.device, non_blocking=True)
        latents = self.codec.encode(x, draws=self.draws, index=index).latents
        return Batch(latents, condition.to(self.device), index)


class _Reader(torch.utils.data.Dataset):
    """Reads a list of sample counters at once; lives in the worker processes."""

    def __init__(self, dataset: Dataset, draws: Draws) -> None:
        self.dataset, self.draws = dataset, draws
        self.order = Order(draws, len(dataset))

    def __getitems__(self, counters: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, dict[int, str]]:
        """(samples, counters, positions, corrupt positions with reasons)"""
        bad: dict[int, str] = {}
        samples, positions = zip(*(self._read(counter, bad) for counter in counters))
        return torch.stack(samples), torch.tensor(counters), torch.tensor(positions), bad

    def _read(self, counter: int, bad: dict[int, str]) -> tuple[Tensor, int]:
        start, size = self.order(counter), len(self.dataset)
        for position in (*range(start, size), *range(start)):
            try:
                return self.dataset.read(position, draws=self.draws, index=counter), position
            except CorruptImage as error:
                bad[position] = str(error)
            if len(bad) > self.dataset.max_corrupt * size:
                break  # the loader is going to stop with the list
        return torch.empty(self.dataset.sample_shape), start


def _check_division(batch_size: int, accumulation: int, world_size: int, rank: int) -> None:
    if min(batch_size, accumulation, world_size) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            "batch_size, accumulation and world_size must be at least 1 and rank in [0, world_size), got "
            f"batch_size={batch_size}, accumulation={accumulation}, world_size={world_size}, rank={rank}"
        )
    step = accumulation * world_size
    if batch_size % step:
        near = [n for n in (batch_size // step * step, (batch_size // step + 1) * step) if n]
        raise ValueError(
            f"batch_size must be a multiple of accumulation * world_size = {accumulation} * {world_size} = {step}, "
            f"got {batch_size}; the nearest valid sizes are {' and '.join(map(str, near))}"
        )


def _unchanged(item: Any) -> Any:
    return item


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
