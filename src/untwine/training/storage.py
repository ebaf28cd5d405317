"""The file operations a checkpoint is made of, behind one seam.

Everything :mod:`untwine.training.checkpoint` changes on disk goes through a :class:`Storage`, so that a test (or
another file system) can replace it and fail or crash at any single operation.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from untwine.training.distributed import group


class Storage:
    """The local (or mounted) file system. Every method raises OSError where the operation fails."""

    def make(self, folder: Path) -> None:
        """Creates a folder and its parents."""
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Writes a small file and flushes it to the device."""
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def write_tensors(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes each rank's part of ``tensors`` as one safetensors file a rank, flushed; collective.

        An OSError of one rank is raised on every rank.
        """
        local = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _plain_errors():
            save_shards(
                local,
                storage_writer=writer,
                planner=planner,
                process_group=group(),
                no_dist=not dist.is_initialized(),
            )

    def read_tensors(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fills ``tensors`` in place from what any number of ranks wrote; collective."""
        local = {name: tensor.detach() for name, tensor in tensors.items()}
        reader = HuggingFaceStorageReader(str(folder))
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _plain_errors():
            load_shards(local, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())

    def rename(self, source: Path, target: Path) -> None:
        """Renames a folder atomically."""
        source.rename(target)

    def sync(self, folder: Path) -> None:
        """Flushes the entries of a folder, so that renames inside it survive a power cut."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def list(self, folder: Path) -> list[str]:
        """Names inside a folder, sorted; none where it does not exist."""
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    def delete(self, folder: Path) -> None:
        """Removes a folder with everything in it."""
        shutil.rmtree(folder)

    def free(self, folder: Path) -> int:
        """Bytes that can still be written."""
        return shutil.disk_usage(folder).free


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises what failed on some rank itself, an OSError first, and lets one process be one without a warning."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error


LOCAL = Storage()
