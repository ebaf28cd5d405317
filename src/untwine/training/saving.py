"""The checkpoints of one run: saved through full disks, and found again only by the run that they belong to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from untwine.training import checkpoint
from untwine.training.checkpoint import CheckpointError, CheckpointNotSaved
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
    """Saves and restores a run.

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

    @property
    def path(self) -> Path | None:
        """The newest checkpoint."""
        return None if self.saved is None else self.root / f"step-{self.saved}"

    def save(self, step: int, networks: Networks, *, last: bool = False) -> None:
        """Commits a checkpoint. A failure is logged, unless it is the third in a row or the ``last`` chance.

        Raises:
            SavingFailed: with what to do about it.
        """
        if self.saved == step:
            return
        state = {"step": step, "updates": networks.updates, **self.about}
        try:
            checkpoint.save(
                self.root,
                step,
                networks.tensors(),
                state,
                config=self.recipe.to_dict(),
                keep=self.recipe.train.keep,
                storage=self.storage,
            )
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
