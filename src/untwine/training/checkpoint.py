"""Checkpoints that are complete or not there: one format for one process and for many.

A checkpoint is a folder ``step-N`` with one safetensors file a rank (written by ``torch.distributed.checkpoint``, so
that any number of ranks can read it), ``state.json``, ``config.json`` and ``manifest.json``. It is written as
``step-N.tmp-<id>``, flushed, sealed by the manifest (size and sha256 of every file, and of the manifest itself),
renamed, and the rename is flushed; older ones are deleted after that. Readers accept only what its manifest describes.
No pickle is written or read, so opening a stranger's checkpoint runs no code.

With a process group, every function here but :func:`verify`, :func:`read_state` and :func:`read_config` is collective,
and the folder is shared between the processes.
"""

from __future__ import annotations

import difflib
import errno
import logging
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from untwine.training.distributed import on_main, rank, together, world_size
from untwine.training.manifest import (
    CONFIG,
    MANIFEST,
    STATE,
    CheckpointError,
    check_files,
    check_headers,
    compose,
    fingerprints,
    read_manifest,
    read_note,
    to_json,
)
from untwine.training.storage import LOCAL, Storage

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"(step-\d+)\.tmp-[0-9a-f]+")


class CheckpointNotSaved(CheckpointError):
    """A save that failed and left no trace; what was saved before is untouched, and saving may be tried again.

    Args:
        reason: what the system said.
        needed: bytes the checkpoint takes, with a margin.
        free: bytes left where it should go, -1 if that cannot be found out.
    """

    def __init__(self, reason: str, needed: int, free: int) -> None:
        super().__init__(reason, needed, free)
        self.reason, self.needed, self.free = reason, needed, free

    def __str__(self) -> str:
        return f"checkpoint not saved: {self.reason} (needed {self.needed} bytes, free {self.free} bytes)"


@dataclass(frozen=True)
class Report:
    """What :func:`load_matching` did, by tensor name."""

    kept: tuple[str, ...]
    """filled from the checkpoint"""
    reinitialised: tuple[str, ...]
    """left as they were: not in the checkpoint, or of another shape"""
    unused: tuple[str, ...]
    """in the checkpoint only"""


def save(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    keep: int = 2,
    storage: Storage = LOCAL,
) -> Path:
    """Commits ``root/step-<step>`` and then deletes all but the newest ``keep`` checkpoints up to this step.

    Checkpoints of later steps belong to a branch that this run has left; they are renamed ``abandoned-step-N-<id>``
    and never deleted. A checkpoint of the same step is replaced.

    Args:
        tensors: flat, by fully qualified name; plain tensors (equal on all ranks) and DTensors.
        state: JSON values (string keys; tuples come back as lists).
        config: the resolved configuration, JSON values.

    Raises:
        ValueError: for ``keep`` < 2, a negative step, no tensors, or values that JSON cannot hold.
        CheckpointNotSaved: where the file system refuses; nothing half-written remains.
    """
    if keep < 2 or step < 0 or not tensors:
        raise ValueError(
            f"save needs keep >= 2, step >= 0 and tensors; got keep={keep}, step={step}, {len(tensors)} tensors"
        )
    root = Path(root)
    notes = {STATE: to_json("state", state), CONFIG: to_json("config", config)}
    needed = int(1.2 * sum(t.numel() * t.element_size() for t in tensors.values())) + sum(map(len, notes.values()))
    temporary = root / on_main(lambda: f"step-{step}.tmp-{uuid.uuid4().hex}")
    try:
        on_main(lambda: _make_room(storage, temporary, needed))
        storage.write_tensors(temporary, tensors)
        parts = together(lambda: fingerprints(temporary, storage.list(temporary)[_share()]))
        files = {name: entry for part in parts for name, entry in part.items()}
        on_main(lambda: _seal(storage, temporary, step, files, notes))
        on_main(lambda: _publish(storage, temporary, root / f"step-{step}"))
    except OSError as error:
        free = on_main(lambda: _clean_up(storage, temporary))
        raise CheckpointNotSaved(str(error), needed, free) from error
    on_main(lambda: _purge(storage, root, step, keep))
    return root / f"step-{step}"


def latest(root: str | Path, *, verify: bool = True) -> Path | None:
    """The newest undamaged checkpoint below ``root``, or None where there is none at all.

    Each damaged one that is passed over is logged with the file and what is wrong with it.

    Raises:
        CheckpointError: where checkpoints exist but every one is damaged: starting afresh must be somebody's decision.
    """
    root = Path(root)
    steps = on_main(lambda: _steps(LOCAL, root))
    for step in reversed(steps):
        path = root / f"step-{step}"
        try:
            _check_together(path, verify)
        except CheckpointError as error:
            logger.warning("checkpoint passed over: %s", error)
        else:
            return path
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {root} is intact; use another folder to start afresh"
        )
    return None


def verify(path: str | Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``, after every file was compared with it.

    Raises:
        CheckpointError: naming the file and the expected and actual size or sha256.
    """
    return check_files(Path(path))


def read_state(path: str | Path) -> dict[str, Any]:
    """The ``state`` that was saved; only this one file is compared with the manifest."""
    return read_note(Path(path), STATE)


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``config`` that was saved; only this one file is compared with the manifest."""
    return read_note(Path(path), CONFIG)


def load(path: str | Path, tensors: Mapping[str, Tensor], *, verify: bool = True) -> None:
    """Fills ``tensors`` in place from the checkpoint at ``path``, written by any number of ranks.

    Args:
        tensors: exactly the names, shapes and dtypes that were saved; plain tensors and DTensors.
        verify: compare sizes and sha256 first. False skips the hashes of the tensor files, nothing else.

    Raises:
        CheckpointError: for a damaged checkpoint, and for missing, unexpected or differing tensors.
    """
    saved = _inventory(Path(path), verify)
    missing, unexpected = sorted(set(tensors) - set(saved)), sorted(set(saved) - set(tensors))
    if missing or unexpected:
        listed = _list_names("missing", missing, unexpected) + _list_names("unexpected", unexpected, missing)
        raise CheckpointError(f"{path} does not hold the tensors asked for;{listed}")
    wrong = [
        f"{name} is {tuple(saved[name].size)} {saved[name].properties.dtype}, wanted {tuple(t.shape)} {t.dtype}"
        for name, t in tensors.items()
        if saved[name].size != t.shape or saved[name].properties.dtype != t.dtype
    ]
    if wrong:
        raise CheckpointError(f"{path} holds {len(wrong)} tensors of another form: {'; '.join(wrong[:20])}")
    _fill(Path(path), tensors)


def load_matching(path: str | Path, tensors: Mapping[str, Tensor]) -> Report:
    """Fills those ``tensors`` that the checkpoint holds in the same shape, cast to their dtype, for fine-tuning.

    Args:
        path: a checkpoint, or a folder of checkpoints, of which the newest is taken.

    Raises:
        CheckpointError: for a damaged or missing checkpoint, and where nothing matches at all.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        path = latest(path, verify=False) or path
    saved = _inventory(path, verify=True)
    kept = [name for name, t in tensors.items() if name in saved and saved[name].size == t.shape]
    if not kept:
        listed = _list_names("wanted", sorted(tensors), sorted(saved))
        raise CheckpointError(f"nothing in {path} has the name and shape of a wanted tensor;{listed}")
    _fill(path, {name: tensors[name] for name in kept})
    reinitialised = tuple(name for name in tensors if name not in set(kept))
    return Report(tuple(kept), reinitialised, tuple(sorted(set(saved) - set(tensors))))


def recover(root: str | Path, *, storage: Storage = LOCAL) -> None:
    """Clears what an interrupted save or deletion left: completes a sealed folder, removes every other one.

    Only for the process that owns the folder, see :func:`~untwine.training.locking.lock`.
    """
    on_main(lambda: _recover(storage, Path(root)))


def _make_room(storage: Storage, folder: Path, needed: int) -> None:
    storage.make(folder)
    free = storage.free(folder)
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left for {folder.name} in {folder.parent}")


def _seal(storage: Storage, folder: Path, step: int, files: dict[str, Any], notes: Mapping[str, bytes]) -> None:
    """Writes the JSON files, and last the manifest that makes the folder a checkpoint."""
    for name, data in notes.items():
        storage.write(folder / name, data)
    files |= fingerprints(folder, notes)
    storage.write(folder / MANIFEST, compose(step, world_size(), files))
    storage.sync(folder)


def _publish(storage: Storage, folder: Path, target: Path) -> None:
    """Renames a sealed folder; an older checkpoint of that step steps aside, and comes back if the rename fails."""
    aside = (
        target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}")
        if target.name in storage.list(target.parent)
        else None
    )
    if aside:
        storage.rename(target, aside)
    try:
        storage.rename(folder, target)
    except OSError:
        if aside:
            storage.rename(aside, target)
        raise
    storage.sync(target.parent)
    if aside:
        _discard(storage, aside)


def _purge(storage: Storage, root: Path, step: int, keep: int) -> None:
    try:
        steps = _steps(storage, root)
        for later in (s for s in steps if s > step):
            name = f"abandoned-step-{later}-{uuid.uuid4().hex[:8]}"
            storage.rename(root / f"step-{later}", root / name)
            logger.warning("step-%d is of a branch this run has left; it is now %s", later, root / name)
        for old in [s for s in steps if s <= step][:-keep]:
            # A rename first: a deletion that is cut short must not leave half a folder under a checkpoint's name.
            doomed = root / f"step-{old}.tmp-{uuid.uuid4().hex}"
            storage.rename(root / f"step-{old}", doomed)
            storage.delete(doomed)
    except OSError as error:
        logger.warning("old checkpoints in %s could not be removed: %s", root, error)


def _recover(storage: Storage, root: Path) -> None:
    for name in storage.list(root):
        if not (match := _LEFTOVER.fullmatch(name)):
            continue
        try:
            check_files(root / name)
            complete = match[1] not in storage.list(root)
        except CheckpointError:
            complete = False
        if complete:
            _publish(storage, root / name, root / match[1])
        else:
            _discard(storage, root / name)


def _clean_up(storage: Storage, folder: Path) -> int:
    """Removes a failed save; the bytes then free."""
    _discard(storage, folder)
    with suppress(OSError):
        return storage.free(folder.parent)
    return -1


def _discard(storage: Storage, folder: Path) -> None:
    try:
        storage.delete(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def _steps(storage: Storage, root: Path) -> list[int]:
    return sorted(int(match[1]) for name in storage.list(root) if (match := _STEP.fullmatch(name)))


def _share() -> slice:
    """Which of a list of files this process reads."""
    return slice(rank(), None, world_size())


def _check_together(path: Path, verify: bool) -> None:
    """Checks names and sizes, and the hashes too where ``verify``, each process those of its share of the files."""
    together(lambda: check_files(path, _share()) if verify else read_manifest(path))


def _inventory(path: Path, verify: bool) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and chunks of every tensor in a checkpoint, after its files were checked."""
    _check_together(path, verify)
    check_headers(path)
    try:
        saved = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a hostile file makes the parser raise
        raise CheckpointError(f"{path} holds a file that is not safetensors: {error}") from error
    tensors = {name: tensor for name, tensor in saved.items() if isinstance(tensor, TensorStorageMetadata)}
    for name, tensor in tensors.items():
        parts = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        if parts != tensor.size.numel() or min((o for c in tensor.chunks for o in c.offsets), default=0) < 0:
            raise CheckpointError(f"{path}: the parts of {name} do not add up to its shape {tuple(tensor.size)}")
    return tensors


def _fill(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        LOCAL.read_tensors(path, tensors)
    except Exception as error:  # as above
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def _list_names(what: str, names: list[str], others: list[str]) -> str:
    """``N what: a (did you mean 'b'?), c`` for up to 20 names."""
    if not names:
        return ""
    shown = []
    for name in names[:20]:
        close = difflib.get_close_matches(name, others[:2000], n=1)
        shown.append(f"{name} (nearest: {close[0]})" if close else name)
    return f" {len(names)} {what}: {', '.join(shown)}{', ...' if len(names) > 20 else ''};"
