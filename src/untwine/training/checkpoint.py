"""Checkpoints that are complete or not there: one format for one process and for many.

A checkpoint is a folder ``step-N`` with one safetensors file a rank (written by ``torch.distributed.checkpoint``, so that
any number of ranks can read it), ``state.json``, ``config.json`` and ``manifest.json``. It is written as
``step-N.tmp-<id>``, flushed, sealed by the manifest (size and sha256 of every file, and of the manifest itself), renamed,
and the rename is flushed; older ones are deleted after that. Readers accept only what its manifest describes. No pickle
is written or read, so opening a stranger's checkpoint runs no code.

With a process group, every function here but :func:`verify`, :func:`read_state` and :func:`read_config` is collective;
folders are shared between ranks.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import logging
import platform
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import untwine
from untwine.training.storage import LOCAL, Storage

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = "untwine-checkpoint-1"
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.json"
_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"(step-\d+)\.tmp-[0-9a-f]+")
_TENSOR_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")
_DROPPINGS = re.compile(r"\.DS_Store|Thumbs\.db|\.nfs[0-9a-f]+")
_MAX_JSON = 64 * 2**20
_MAX_HEADER = 32 * 2**20


class CheckpointError(RuntimeError):
    """A folder that is not a whole, undamaged checkpoint, or that does not fit what it is loaded into."""


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

    Checkpoints of later steps belong to a branch that this run has left; they are set aside as ``abandoned-step-N-<id>``,
    never deleted. A checkpoint of the same step is replaced.

    Args:
        tensors: flat, by fully qualified name; plain tensors (equal on all ranks) and DTensors.
        state: JSON values (string keys; tuples come back as lists).
        config: the resolved configuration, JSON values.

    Raises:
        ValueError: for ``keep`` < 2, a negative step, no tensors, or values that JSON cannot hold.
        CheckpointNotSaved: where the file system refuses; nothing half-written remains.
    """
    if keep < 2 or step < 0 or not tensors:
        raise ValueError(f"save needs keep >= 2, step >= 0 and tensors; got keep={keep}, step={step}, {len(tensors)} tensors")
    root = Path(root)
    notes = {STATE: _to_json("state", state), CONFIG: _to_json("config", config)}
    needed = int(1.2 * sum(t.numel() * t.element_size() for t in tensors.values())) + sum(map(len, notes.values()))
    temporary = root / _on_main(lambda: f"step-{step}.tmp-{uuid.uuid4().hex}")
    try:
        _on_main(lambda: _make_room(storage, temporary, needed))
        storage.write_tensors(temporary, tensors)
        files = _merge(_together(lambda: _fingerprints(temporary, storage.list(temporary)[_rank() :: _world_size()])))
        _on_main(lambda: _seal(storage, temporary, step, files, notes))
        _on_main(lambda: _publish(storage, temporary, root / f"step-{step}"))
    except OSError as error:
        free = _on_main(lambda: _clean_up(storage, temporary))
        raise CheckpointNotSaved(str(error), needed, free) from error
    _on_main(lambda: _purge(storage, root, step, keep))
    return root / f"step-{step}"


def latest(root: str | Path, *, verify: bool = True) -> Path | None:
    """The newest undamaged checkpoint below ``root``, or None where there is none at all.

    Each damaged one that is passed over is logged with the file and what is wrong with it.

    Raises:
        CheckpointError: where checkpoints exist but every one is damaged: starting afresh must be somebody's decision.
    """
    root = Path(root)
    steps = _on_main(lambda: _steps(LOCAL, root))
    for step in reversed(steps):
        path = root / f"step-{step}"
        try:
            _together(lambda path=path: _verified(path, every=_world_size() if verify else 0, first=_rank()))
        except CheckpointError as error:
            logger.warning("checkpoint passed over: %s", error)
        else:
            return path
    if steps:
        raise CheckpointError(f"none of the {len(steps)} checkpoints in {root} is intact; use another folder to start afresh")
    return None


def verify(path: str | Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``, after every file was compared with it.

    Raises:
        CheckpointError: naming the file and the expected and actual size or sha256.
    """
    return _verified(Path(path))


def read_state(path: str | Path) -> dict[str, Any]:
    """The ``state`` that was saved; only this one file is compared with the manifest."""
    return _read_note(Path(path), STATE)


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``config`` that was saved; only this one file is compared with the manifest."""
    return _read_note(Path(path), CONFIG)


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

    Only for the process that owns the folder, see :func:`untwine.training.locking.lock`.
    """
    _on_main(lambda: _recover(storage, Path(root)))


# --- writing --------------------------------------------------------------------------------------------------------


def _make_room(storage: Storage, folder: Path, needed: int) -> None:
    storage.make(folder)
    free = storage.free(folder)
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left for {folder.name} in {folder.parent}")


def _seal(storage: Storage, folder: Path, step: int, files: dict[str, Any], notes: Mapping[str, bytes]) -> None:
    """Writes the JSON files, and last the manifest that makes the folder a checkpoint."""
    for name, data in notes.items():
        storage.write(folder / name, data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    versions = {"untwine": untwine.__version__, "torch": torch.__version__, "safetensors": safetensors.__version__}
    manifest = {
        "format": FORMAT,
        "step": step,
        "files": files,
        "config_sha256": files[CONFIG]["sha256"],
        "versions": versions | {"python": platform.python_version()},
        "world_size": _world_size(),
    }
    storage.write(folder / MANIFEST, _signed(manifest))
    storage.sync(folder)


def _publish(storage: Storage, folder: Path, target: Path) -> None:
    """Renames a sealed folder; an older checkpoint of that step steps aside, and comes back if the rename fails."""
    aside = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}") if target.name in storage.list(target.parent) else None
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
            _verified(root / name)
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


def _to_json(argument: str, value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, indent=1, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must hold JSON values (tensors go into `tensors`): {error}") from error


def _signed(manifest: Mapping[str, Any]) -> bytes:
    """The one text of a manifest, with the sha256 of everything else in it."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True).encode()


def _fingerprints(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    return {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


def _verified(path: Path, *, every: int = 1, first: int = 0) -> dict[str, Any]:
    """The manifest, after the hashes of its files ``first, first + every, ...`` were checked (``every=0``: of none)."""
    manifest = _read_manifest(path)
    for name in sorted(manifest["files"])[first::every] if every else ():
        _check_hash(path / name, manifest["files"][name]["sha256"])
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked against itself and against names and sizes in the folder."""
    raw = _read_small(path / MANIFEST)
    manifest = _parse(path / MANIFEST, raw)
    if manifest.get("format") != FORMAT or _signed(manifest) != raw:
        raise CheckpointError(f"{path / MANIFEST} is damaged, or was written by another format than {FORMAT}")
    files = manifest["files"]
    if bad := [name for name in files if name not in (STATE, CONFIG) and not _TENSOR_FILE.fullmatch(name)]:
        raise CheckpointError(f"{path / MANIFEST} lists {bad[:5]}; a checkpoint holds {STATE}, {CONFIG} and *.safetensors")
    present = {entry.name: entry for entry in path.iterdir() if not _DROPPINGS.fullmatch(entry.name)}
    if strangers := sorted(set(present) - set(files) - {MANIFEST}):
        raise CheckpointError(f"{path} holds files that its manifest does not list: {strangers[:5]}; remove them")
    for name, expected in files.items():
        actual = present[name].stat().st_size if name in present and present[name].is_file() else None
        if actual != expected["size"]:
            raise CheckpointError(f"{path / name}: expected {expected['size']} bytes, found {actual}")
    return manifest


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.parent} is not a checkpoint: {path.name} cannot be read ({error.strerror})") from error


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object, not {type(value).__name__}")
    return value


def _read_note(path: Path, name: str) -> dict[str, Any]:
    files = _read_manifest(path)["files"]
    if name not in files:
        raise CheckpointError(f"{path} has no {name}")
    _check_hash(path / name, files[name]["sha256"])
    return _parse(path / name, _read_small(path / name))


def _check_hash(path: Path, expected: str) -> None:
    if (actual := _sha256(path)) != expected:
        raise CheckpointError(f"{path} is damaged: expected sha256 {expected}, found {actual}")


def _inventory(path: Path, verify: bool) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and chunks of every tensor in a checkpoint, after its files were checked."""
    manifest = _merge(_together(lambda: _verified(path, every=_world_size() if verify else 0, first=_rank())))
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            _check_header(path / name)
    try:
        saved = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds a file that is not safetensors: {error}") from error
    for name, tensor in saved.items():
        chunks = [chunk.sizes.numel() for chunk in tensor.chunks]
        if sum(chunks) != tensor.size.numel() or any(o < 0 for chunk in tensor.chunks for o in chunk.offsets):
            raise CheckpointError(f"{path}: the parts of {name} do not add up to its shape {tuple(tensor.size)}")
    return saved  # type: ignore[return-value]


def _check_header(path: Path) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    limit = min(_MAX_HEADER, path.stat().st_size - 8)
    if length > limit:
        raise CheckpointError(f"{path} is not safetensors: its header claims {length} bytes, at most {limit} are possible")


def _fill(path: Path, tensors: Mapping[str, Tensor]) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = HuggingFaceStorageReader(str(path))
    try:
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
    except CheckpointException as error:
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


# --- ranks ----------------------------------------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _together(fn: Callable[[], T]) -> list[T]:
    """Runs ``fn`` on every rank: all results, or on every rank the error of the first one that failed."""
    if not dist.is_initialized():
        return [fn()]
    result, error = None, None
    try:
        result = fn()
    except Exception as caught:
        error = caught
    gathered: list[Any] = [None] * _world_size()
    dist.all_gather_object(gathered, (result, error))
    for _, error in gathered:
        if error is not None:
            raise error
    return [result for result, _ in gathered]


def _on_main(fn: Callable[[], T]) -> T:
    """Runs ``fn`` on rank 0; every rank gets its result or its error."""
    return _together(lambda: fn() if _rank() == 0 else None)[0]  # type: ignore[return-value]


def _merge(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}
