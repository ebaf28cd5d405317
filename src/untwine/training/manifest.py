"""The manifest of a checkpoint: which files belong to it, how large they are and what they hash to.

Nothing here trusts the folder it reads: a truncated or altered file, a file that is not listed, a name that leads out
of the folder or a header that claims more than its file holds is a :class:`CheckpointError` before any of it is used.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

import untwine

FORMAT = "untwine-checkpoint-1"
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.json"
_TENSOR_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")
_DROPPINGS = re.compile(r"\.DS_Store|Thumbs\.db|\.nfs[0-9a-f]+")
_MAX_JSON = 64 * 2**20
_MAX_HEADER = 32 * 2**20


class CheckpointError(RuntimeError):
    """A folder that is not a whole, undamaged checkpoint, or that does not fit what it is loaded into."""


def to_json(argument: str, value: Mapping[str, Any]) -> bytes:
    """``value`` as JSON text.

    Raises:
        ValueError: naming ``argument``, for anything that JSON cannot hold.
    """
    try:
        return json.dumps(value, indent=1, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must hold JSON values (tensors go into `tensors`): {error}") from error


def fingerprints(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> size in bytes and sha256 of the files ``names`` in ``folder``."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def compose(step: int, world_size: int, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The text of ``manifest.json`` for a folder of ``files``, as :func:`fingerprints` describes them."""
    versions = {"untwine": untwine.__version__, "torch": torch.__version__, "safetensors": safetensors.__version__}
    return _signed(
        {
            "format": FORMAT,
            "step": step,
            "files": files,
            "config_sha256": files[CONFIG]["sha256"],
            "versions": versions | {"python": platform.python_version()},
            "world_size": world_size,
        }
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``, compared with itself and with the names and sizes in the folder."""
    raw = _read_small(path / MANIFEST)
    manifest = _parse(path / MANIFEST, raw)
    if manifest.get("format") != FORMAT or _signed(manifest) != raw:
        raise CheckpointError(f"{path / MANIFEST} is damaged, or is not in the format {FORMAT}")
    files = _listed(path / MANIFEST, manifest)
    if bad := [name for name in files if name not in (STATE, CONFIG) and not _TENSOR_FILE.fullmatch(name)]:
        raise CheckpointError(f"{path / MANIFEST} lists {bad[:5]}; a checkpoint holds {STATE}, {CONFIG}, *.safetensors")
    present = {entry.name: entry for entry in path.iterdir() if not _DROPPINGS.fullmatch(entry.name)}
    if strangers := sorted(set(present) - set(files) - {MANIFEST}):
        raise CheckpointError(f"{path} holds files that its manifest does not list: {strangers[:5]}; remove them")
    for name, expected in files.items():
        actual = present[name].stat().st_size if name in present and present[name].is_file() else None
        if actual != expected["size"]:
            raise CheckpointError(f"{path / name}: expected {expected['size']} bytes, found {actual}")
    return manifest


def check_files(path: Path, part: slice = slice(None)) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``, after the hashes of ``part`` of its files were compared."""
    manifest = read_manifest(path)
    for name in sorted(manifest["files"])[part]:
        _check_hash(path / name, manifest["files"][name]["sha256"])
    return manifest


def check_headers(path: Path) -> None:
    """Refuses tensor files whose header could not fit into them, before anything is allocated for it."""
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as stream:
            claimed = int.from_bytes(stream.read(8), "little")
        limit = min(_MAX_HEADER, file.stat().st_size - 8)
        if claimed > limit:
            raise CheckpointError(
                f"{file} is not safetensors: a header of {claimed} bytes, at most {limit} are possible"
            )


def read_note(path: Path, name: str) -> dict[str, Any]:
    """One JSON file of the checkpoint at ``path``; only this one is hashed."""
    files = read_manifest(path)["files"]
    if name not in files:
        raise CheckpointError(f"{path} has no {name}")
    _check_hash(path / name, files[name]["sha256"])
    return _parse(path / name, _read_small(path / name))


def _listed(path: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    files = manifest.get("files")
    entries = list(files.values()) if isinstance(files, dict) else [None]
    if not all(isinstance(e, dict) and type(e.get("size")) is int and type(e.get("sha256")) is str for e in entries):
        raise CheckpointError(f"{path} must hold `files`, each with a size and a sha256")
    return manifest["files"]


def _signed(manifest: Mapping[str, Any]) -> bytes:
    """The one text of a manifest, with the sha256 of everything else in it."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True).encode()


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} is no checkpoint: {path.name} cannot be read ({error.strerror})"
        ) from error


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object, not a {type(value).__name__}")
    return value


def _check_hash(path: Path, expected: str) -> None:
    if (actual := _sha256(path)) != expected:
        raise CheckpointError(f"{path} is damaged: expected sha256 {expected}, found {actual}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
