"""The order of training, and the loader that follows it.

Counter c stands for the c-th sample that training ever sees. It fixes everything about it: epoch ``c // n``, position
``permutation(epoch)[c % n]``, augmentation and noise. Update u with global batch G consumes counters [uG, (u+1)G), cut
first into micro-batches, then by rank, in contiguous pieces. So neither world size, accumulation nor worker processes
change what an update sees, and resuming needs only the number of the update. Of data in buckets, all samples of an
update are of one bucket.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch import Tensor

from untwine.codecs.base import Codec
from untwine.conditions.text import Text
from untwine.contracts import Batch, Condition, check_labels
from untwine.data.base import CorruptImage, Dataset
from untwine.data.buckets import Bucketed
from untwine.data.features import FrozenFeatures
from untwine.diffusion.draws import Draws

logger = logging.getLogger(__name__)
_reader: _Reader
"""of a worker process"""


class Order:
    """Positions in a data set of ``size`` samples by sample counter; each epoch is a permutation.

    With ``buckets`` (size,), every ``batch_size`` counters are of one bucket: an epoch is the full batches of all
    buckets in random turn, without the rest of each, which is another one in every epoch.
    """

    def __init__(self, draws: Draws, size: int, buckets: np.ndarray | None = None, batch_size: int = 1) -> None:
        self.draws, self.num_samples, self.buckets, self.batch_size = draws, size, buckets, batch_size
        self.size = size if buckets is None else int((np.bincount(buckets) // batch_size).sum()) * batch_size
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __call__(self, counter: int) -> int:
        epoch, place = divmod(counter, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._arranged(epoch)
        return int(self._permutation[place])

    def instead(self, position: int) -> Iterator[int]:
        """``position``, and then those that may stand in for it."""
        for step in range(self.num_samples):
            other = (position + step) % self.num_samples
            if self.buckets is None or self.buckets[other] == self.buckets[position]:
                yield other

    def _arranged(self, epoch: int) -> np.ndarray:
        order = self.draws.permutation("order", self.num_samples, epoch)
        if self.buckets is None:
            return order
        parts = [order[self.buckets[order] == bucket] for bucket in np.unique(self.buckets)]
        full = [part[: len(part) // self.batch_size * self.batch_size] for part in parts]
        batches = np.concatenate(full).reshape(-1, self.batch_size)
        return batches[self.draws.permutation("buckets", len(batches), epoch)].ravel()


class Loader:
    """Training data, update by update: iterating yields the list of micro-batches of each update, without end.

    Args:
        dataset: what to read. A corrupt sample is replaced by the next one that can be read; above the fraction
            ``dataset.max_corrupt`` the loader stops.
        codec: encodes the samples, in this process and on ``device``.
        seed: of the order and of augmentation.
        batch_size: samples per update, over all ranks and micro-batches.
        accumulation: micro-batches per update.
        text: conditions the samples on their captions instead of their labels.
        features: of frozen encoders, to add to each batch.
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
        text: Text | None = None,
        features: FrozenFeatures | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(dataset):
            raise ValueError("dataset is empty; nothing to train on")
        if num_workers < 0 or start_update < 0:
            raise ValueError(f"num_workers and start_update must be >= 0, got {num_workers} and {start_update}")
        _check_division(batch_size, accumulation, world_size, rank)
        if dataset.labels is not None:
            check_labels(torch.from_numpy(dataset.labels), dataset.num_classes)
        self.order = _order(dataset, Draws(seed), batch_size)
        self.dataset, self.codec, self.text, self.features = dataset, codec, text, features
        self.draws = Draws(seed)
        self.batch_size, self.accumulation, self.rank, self.world_size = batch_size, accumulation, rank, world_size
        self.num_workers, self.start_update = num_workers, start_update
        self.device = torch.device(device)
        self.corrupt: dict[int, str] = {}
        """position -> what is wrong there, for every corrupt sample met"""

    def __iter__(self) -> Iterator[list[Batch]]:
        micro: list[Batch] = []
        for read in self._samples(_Reader(self.dataset, self.draws, self.order)):
            self._note(read)
            micro.append(self._batch(read))
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

    def _samples(self, reader: _Reader) -> Iterator[_Read]:
        """Micro-batch after micro-batch, read here or ahead by worker processes.

        The processes are no ``DataLoader`` workers: when one of those dies, a signal handler raises wherever this
        process happens to be, be it in the middle of an optimizer step.
        """
        if not self.num_workers:
            yield from map(reader, self._counters())
            return
        others, workers = set(multiprocessing.active_children()), set()
        pool = ProcessPoolExecutor(self.num_workers, initializer=_start_worker, initargs=(reader,))
        pending: deque[Future[_Read]] = deque()
        first = self.start_update * self.batch_size
        try:
            for counters in self._counters():
                pending.append(pool.submit(_read_in_worker, counters))
                workers |= set(multiprocessing.active_children()) - others
                if len(pending) > 2 * self.num_workers:
                    read = pending.popleft().result()
                    yield read
                    first = read.counters[-1] + 1
        except BrokenProcessPool as error:
            pool.shutdown()  # waits until the exit codes are known
            raise RuntimeError(
                f"a data worker died ({_exits(workers)}) while it read sample {first} or a later one; "
                "if the system ran out of memory, use fewer workers (num_workers) or a smaller batch_size"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def _note(self, read: _Read) -> None:
        for position, reason in read.corrupt.items():
            if position not in self.corrupt:
                logger.warning("corrupt sample replaced by the next one: %s", reason)
                self.corrupt[position] = reason
        if len(self.corrupt) > self.dataset.max_corrupt * len(self.dataset):
            listed = "\n  ".join(list(self.corrupt.values())[:20])
            raise CorruptImage(
                f"{len(self.corrupt)} of {len(self.dataset)} samples are corrupt, more than max_corrupt = "
                f"{self.dataset.max_corrupt} allows; repair or remove them:\n  {listed}"
            )
        if not read.positions:
            raise CorruptImage(f"no sample of a bucket can be read: {next(reversed(read.corrupt.values()))}")

    def _batch(self, read: _Read) -> Batch:
        index = torch.tensor(read.counters)
        x = read.x.to(self.device)
        latents = self.codec.encode(x, draws=self.draws, index=index).latents
        u = self.draws.uniform("caption", (), index).tolist() if self.text is not None else None
        batch = conditioned(latents, index, self.dataset, read.positions, self.text, u)
        return batch if self.features is None else self.features.fill(batch, x, read.positions)


def conditioned(
    latents: Tensor,
    index: Tensor,
    dataset: Dataset,
    positions: Sequence[int] | np.ndarray,
    text: Text | None = None,
    u: Sequence[float] | None = None,
) -> Batch:
    """The batch of the samples at ``positions``, under their captions where there is a ``text``, else their labels.

    Args:
        u: in [0, 1), which line of its caption each sample takes; None = the first.
    """
    if text is None:
        labels = dataset.labels
        condition = Condition() if labels is None else Condition(labels=torch.from_numpy(labels[positions]))
        return Batch(latents, condition.to(latents.device), index)
    chosen = []
    for lines, v in zip((lines_of(dataset, p) for p in positions), u or [0.0] * len(positions)):
        chosen.append(lines[int(v * len(lines))])
    condition, null = text.encode(chosen, cut=True), text.null(len(chosen))
    return Batch(latents, condition.to(latents.device), index, null=null.to(latents.device))


def lines_of(dataset: Dataset, position: int) -> list[str]:
    """The alternatives that the caption of a sample offers, one a line."""
    assert dataset.captions is not None
    return dataset.captions[position].splitlines() or [""]


@dataclass
class _Read:
    """One micro-batch as it was read."""

    x: Tensor
    """(B, C, H, W)"""
    counters: list[int]
    positions: list[int]
    """empty where one could not be read or replaced"""
    corrupt: dict[int, str]
    """position -> what is wrong there"""


class _Reader:
    """Reads the samples of a list of counters; a corrupt one is replaced by the next that can be read."""

    def __init__(self, dataset: Dataset, draws: Draws, order: Order) -> None:
        self.dataset, self.draws, self.order = dataset, draws, order

    def __call__(self, counters: list[int]) -> _Read:
        corrupt: dict[int, str] = {}
        samples, positions = [], []
        for counter in counters:
            sample, position = self._read(counter, corrupt)
            if sample is None:
                return _Read(torch.empty(0), counters, [], corrupt)
            samples.append(sample)
            positions.append(position)
        return _Read(torch.stack(samples), counters, positions, corrupt)

    def _read(self, counter: int, corrupt: dict[int, str]) -> tuple[Tensor | None, int]:
        """The sample and where it stands; None where the loader stops, for what is in ``corrupt``."""
        start = self.order(counter)
        for position in self.order.instead(start):
            try:
                return self.dataset.read(position, draws=self.draws, index=counter), position
            except CorruptImage as error:
                corrupt[position] = str(error)
            if len(corrupt) > self.dataset.max_corrupt * len(self.dataset):
                break
        return None, start


def _order(dataset: Dataset, draws: Draws, batch_size: int) -> Order:
    """The order of a data set, which tells what it never shows."""
    if not isinstance(dataset, Bucketed):
        return Order(draws, len(dataset))
    order = Order(draws, len(dataset), dataset.buckets, batch_size)
    counts = np.bincount(dataset.buckets)
    small = [i for i, count in enumerate(counts) if 0 < count < batch_size]
    shapes = ", ".join(f"{dataset.shapes[i][0]} x {dataset.shapes[i][1]}" for i in small)
    told = f"{counts[small].sum()} pictures are in buckets of fewer than batch_size = {batch_size}: {shapes}"
    if not order.size:
        raise ValueError(f"{told}; lower data.max_ratio or train.batch_size, or raise data.unit")
    if small:
        logger.warning("%s; they are never seen", told)
    return order


def _start_worker(reader: _Reader) -> None:
    """Prepares a worker process: it leaves signals to the training process, and ends when that one does."""
    global _reader
    _reader = reader
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read_in_worker(counters: list[int]) -> _Read:
    return _reader(counters)


def _exits(workers: set[BaseProcess]) -> str:
    """How processes ended that did not end in an orderly way."""
    codes = {w.exitcode for w in workers} - {None, 0, -signal.SIGTERM}
    return ", ".join(signal.Signals(-c).name if c < 0 else f"exit code {c}" for c in codes if c) or "terminated"


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
