"""The checkpoints of one run: saved through full disks, and found again only by the run that they belong to.

A save in the background costs the training loop a copy of the state in the memory of the host. A thread writes the
copy, hashes and renames it, and its processes speak over a group of their own; what became of it is known when the
next save, or the end, asks. A run killed meanwhile continues from the save before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from untwine.training import checkpoint
from untwine.training.checkpoint import CheckpointError, CheckpointNotSaved
from untwine.training.distributed import TIMEOUT_SECONDS, speaking_over
from untwine.training.networks import Networks
from untwine.training.recipe import Recipe, differences
from untwine.training.storage import LOCAL, Storage

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
MAX_FAILURES = 3
"""saves in a row that may fail before the run stops"""


class SavingFailed(CheckpointError):
    """The run stopped because it could not be saved; what was saved before is intact."""


class Keeper:
    """Saves and restores a run; as a context, it ends when nothing is being written any more.

    Args:
        folder: of the run.
        recipe: resolved.
        about: JSON values for ``state.json``; ``data`` tells the data set from others.
    """

    def __init__(self, folder: Path, recipe: Recipe, about: dict[str, Any], storage: Storage = LOCAL) -> None:
        self.root, self.recipe, self.about, self.storage = folder / CHECKPOINTS, recipe, about, storage
        self.saved: int | None = None
        """step of the newest checkpoint"""
        self.failures = 0
        """saves that have failed since"""
        self._background: _Background | None = None
        self._pending: tuple[int, Future[Any]] | None = None

    def __enter__(self) -> Keeper:
        if self.recipe.train.async_save:
            self._background = _Background()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._background is not None:
            self._background.close()
            self._background = None
        with suppress(SavingFailed) if error is not None else nullcontext():
            self.settle(last=error is None)

    @property
    def path(self) -> Path | None:
        """The newest checkpoint."""
        return None if self.saved is None else self.root / f"step-{self.saved}"

    def save(self, step: int, networks: Networks, *, last: bool = False, in_background: bool = False) -> None:
        """Commits a checkpoint. A failure is logged, unless it is the third in a row or the ``last`` chance.

        Args:
            in_background: only copy the state now, if the recipe asks for it (``train.async_save``).

        Raises:
            SavingFailed: with what to do about it.
        """
        self.settle()
        if self.saved == step:
            return
        state = {"step": step, "updates": dict(networks.updates), **self.about}

        def commit(tensors: Mapping[str, Tensor]) -> None:
            checkpoint.save(
                self.root,
                step,
                tensors,
                state,
                config=self.recipe.to_dict(),
                keep=self.recipe.train.keep,
                storage=self.storage,
            )

        if in_background and self._background is not None:
            self._pending = step, self._background.submit(commit, networks.tensors())
        else:
            self._account(step, lambda: commit(networks.tensors()), last)

    def settle(self, *, last: bool = False) -> None:
        """Waits for a save in the background, and accounts for it as :meth:`save` does."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            self._account(step, future.result, last)

    def _account(self, step: int, outcome: Callable[[], Any], last: bool) -> None:
        try:
            outcome()
        except CheckpointNotSaved as error:
            self.failures += 1
            if last or self.failures >= MAX_FAILURES:
                raise SavingFailed(self._advice(error)) from error
            logger.error("%s; training goes on and tries again in %d steps", error, self.recipe.train.save_every)
        else:
            self.saved, self.failures = step, 0

    def _advice(self, error: CheckpointNotSaved) -> str:
        start = "the beginning" if self.saved is None else f"step {self.saved}"
        return (
            f"{error}; {self.failures} in a row have failed, and the run stops. Free {error.needed} bytes for "
            f"{self.root} (or move the folder, or lower train.keep to 2), then run the same command: it continues "
            f"from {start}"
        )

    def restore(self, networks: Networks) -> int | None:
        """Fills the networks from the newest intact checkpoint: its step, or None where there is none.

        Raises:
            ValueError: where the checkpoint is of another recipe or other data.
        """
        checkpoint.recover(self.root, storage=self.storage)
        path = checkpoint.latest(self.root)
        if path is None:
            return None
        # Options that the checkpoint does not know had their defaults.
        old = Recipe.from_dict(checkpoint.read_config(path), f"{path.name}/config.json").to_dict()
        if changed := differences(old, self.recipe.to_dict()):
            raise ValueError(
                f"{self.root.parent} holds another run, which differs in\n  "
                + "\n  ".join(changed)
                + "\nuse another out folder"
            )
        state = checkpoint.read_state(path)
        if state["data"] != self.about["data"]:
            raise ValueError(f"the data of {self.root.parent} has changed: {state['data']} -> {self.about['data']}")
        checkpoint.load(path, networks.tensors(), verify=False)  # latest() has verified it
        networks.restored(state["updates"])
        self.saved = state["step"]
        return self.saved


class _Background:
    """One thread that commits copies of the state."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(1, "saving")
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        on_cuda = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=on_cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=on_cuda,
        )
        self.stager = DefaultStager(options)

    def submit(self, commit: Callable[[Mapping[str, Tensor]], None], tensors: dict[str, Tensor]) -> Future[None]:
        """Copies the tensors to the host now, and commits the copy later."""
        copies: Any = self.stager.stage(tensors)

        def work() -> None:
            with speaking_over(self.group):
                commit(copies)

        return self.threads.submit(work)

    def close(self) -> None:
        """Waits for what is being written."""
        self.threads.shutdown()
        self.stager.close()
        if self.group is not None:
            dist.destroy_process_group(self.group)


def prepare_folder(folder: Path, rank: int) -> None:
    """Creates a run folder.

    Raises:
        ValueError: where it cannot be written.
    """
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{rank}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder}: {error.strerror}; choose a writable folder") from error
