"""Pictures in tar shards, as WebDataset has them: a few large files in place of millions of small ones.

A sample is the members of one shard that share a key, their name up to the first dot: a picture (``7.jpg``, ``7.png``,
``7.webp`` ...), and beside it ``7.cls`` (a class, as a number or a name), ``7.txt`` (a caption) or ``7.json`` with a
``label`` and a ``caption``.

Shards are usually streamed and shuffled in a buffer; what is seen when then depends on the number of ranks and workers,
and a run cannot go on in the middle of an epoch. Here an index says where each picture lies, and any of them is one
``pread``. So shards are a data set by position like any other, and the order stays the function of (seed, counter)
that :mod:`untwine.data.loading` makes of it, on any number of processes and after any interruption.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tarfile
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from torch import Tensor

from untwine.data.base import CorruptImage, Dataset
from untwine.data.folder import EXTENSIONS
from untwine.data.images import Preparation, decode
from untwine.diffusion.draws import Draws

logger = logging.getLogger(__name__)
INDEX, FORMAT = "untwine-index.json", "untwine-shards-1"
_LABELS, _CAPTIONS = ("label", "cls", "class"), ("caption", "text", "prompt")
_COLUMNS = {"auto": ("label", "caption"), "flat": (), "classes": ("label",), "captions": ("caption",)}


class Shards(Dataset):
    """Every picture in the tar files under ``root``, in the order of the shards' names and of their members.

    The index is made once and read again while the shards are the same, by size and content, not by date. Names of
    samples are those of their members after that of the shard: keys need be unique in a shard only.

    Args:
        root: the folder of ``*.tar`` files. Compressed ones cannot be read in any order.
        resolution: side of the square samples in pixels.
        channels: 3 (RGB) or 1 (grey).
        layout: "auto" (labels and captions where there are any), or only one of them: "classes", "captions"; "flat"
            ignores both.
        flip: mirror half of the samples (in training only).
        crop: "center", or "random": a square of at least 0.8 of the short side (in training only).
        max_corrupt: fraction of unreadable pictures above which training stops.
        index: folder that keeps the index; default: beside the shards.

    Raises:
        ValueError: for a folder without pictures in shards, a shard that is truncated or has a sample twice, labels or
            captions that some samples lack, and bad options.
    """

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        *,
        channels: Literal[1, 3] = 3,
        layout: Literal["auto", "flat", "classes", "captions"] = "auto",
        flip: bool = False,
        crop: Literal["center", "random"] = "center",
        max_corrupt: float = 0.01,
        index: str | Path | None = None,
    ) -> None:
        self.root, self.layout = Path(root), layout
        if not self.root.is_dir():
            raise ValueError(f"root must be an existing folder, got {str(root)!r}")
        if not 0 <= max_corrupt <= 1:
            raise ValueError(f"max_corrupt must be within [0, 1], got {max_corrupt}")
        self.prepare = Preparation(resolution, channels, crop, flip)
        self.flip, self.crop, self.max_corrupt = flip, crop, max_corrupt
        self.sample_shape = (channels, resolution, resolution)
        self.index = Path(index or root) / INDEX
        self.shards = read_index(self.root, self.index)
        self.names = [f"{name}/{file}" for name, shard in self.shards.items() for file in shard["file"]]
        if not self.names:
            raise ValueError(f"root has no pictures: {len(self.shards)} *.tar files lie under {str(root)!r}")
        self._files = [(self.root / name, shard["sha256"]) for name, shard in self.shards.items()]
        self._shard = np.repeat(np.arange(len(self.shards)), [len(shard["file"]) for shard in self.shards.values()])
        self._offset, self._size = (np.array(self._column(name), np.int64) for name in ("offset", "size"))
        if (labels := self._told("label")) is not None:
            self._read_labels(labels)
        self.captions = self._told("caption")
        self._warned_small = False
        logger.info("%s: %d pictures in %d shards", root, len(self), len(self.shards))

    def __len__(self) -> int:
        return len(self._size)

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        name = self._name(position)
        image = decode(self.content(position), self.prepare.channels, name=name)
        if min(image.size) < self.prepare.resolution and not self._warned_small:
            self._warned_small = True
            logger.warning("pictures smaller than %d are upscaled, the first: %s", self.prepare.resolution, name)
        try:
            return self.prepare(image, draws, index)
        except CorruptImage as error:
            raise CorruptImage(f"{name}: {error}") from error

    def content(self, position: int) -> bytes:
        """The file of a picture.

        Raises:
            CorruptImage: if it cannot be read, or lies elsewhere than the index says.
        """
        offset, size, block = int(self._offset[position]), int(self._size[position]), tarfile.BLOCKSIZE
        try:
            file = _opened(*self._files[self._shard[position]])
            read = os.pread(file.fileno(), block + size, offset - block)
            header = tarfile.TarInfo.frombuf(read[:block], "utf-8", "surrogateescape")  # type: ignore[arg-type]
        except (OSError, tarfile.HeaderError) as error:
            raise CorruptImage(f"{self._name(position)}: {error}; if the shard has changed, start again") from error
        if header.size != size or len(read) != block + size:
            raise CorruptImage(f"{self._name(position)} is not what {self.index} says; if it has changed, start again")
        return read[block:]

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.shards).encode()).hexdigest()
        return {"count": len(self), "bytes": sum(shard["bytes"] for shard in self.shards.values()), "sha256": digest}

    def _name(self, position: int) -> str:
        assert self.names is not None
        return f"{self.root}/{self.names[position]}"

    def _column(self, name: str) -> list[Any]:
        return [value for shard in self.shards.values() for value in shard[name]]

    def _told(self, name: str) -> list[Any] | None:
        """Labels or captions, where the layout wants them and there are any."""
        assert self.names is not None
        values = self._column(name) if name in _COLUMNS[self.layout] else []
        missing = [key for key, value in zip(self.names, values) if value is None]
        if not values or (len(missing) == len(values) and self.layout == "auto"):
            return None
        if missing:
            raise ValueError(
                f"layout {self.layout!r}: {len(missing)} of {len(values)} samples in {self.root} have no {name} "
                f"({_some(missing)}); complete them, or use layout='flat'"
            )
        return values

    def _read_labels(self, values: list[int | str]) -> None:
        try:
            self.labels = np.array([int(value) for value in values], np.int64)
            names = range(int(self.labels.max()) + 1)
        except ValueError:
            names, self.labels = np.unique([str(value) for value in values], return_inverse=True)
        if self.labels.min() < 0:
            raise ValueError(f"labels in {self.root} must be names or numbers >= 0, got {self.labels.min()}")
        self.class_names = tuple(map(str, names))
        self.num_classes = len(self.class_names)


def read_index(root: Path, path: Path) -> dict[str, dict[str, Any]]:
    """What lies where in each shard under ``root``: columns by the shard's name.

    The file ``path`` keeps it; shards that it does not know, or knows otherwise, are looked through.

    Raises:
        ValueError: naming a shard that cannot be used.
    """
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.tar") if not p.name.startswith("."))
    if not names and (packed := sorted(p.name for pattern in ("*.tar.*", "*.tgz") for p in root.rglob(pattern))):
        raise ValueError(f"root has compressed shards only, such as {packed[0]}: decompress them to .tar")
    known = _kept(path)
    with ThreadPoolExecutor() as pool:
        shards = dict(zip(names, pool.map(lambda name: _looked_at(root / name, known.get(name)), names)))
    if shards != known:
        _keep(path, shards)
    return shards


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["shards"] if kept["format"] == FORMAT else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and made anew: %s", path, error)
        return {}


def _keep(path: Path, shards: dict[str, dict[str, Any]]) -> None:
    """Writes the index under another name and renames it: several processes may do so at once."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"format": FORMAT, "shards": shards}), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.warning("the index is not kept (%s); give data.index a folder that can be written", error)


def _looked_at(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of a shard in the index: ``known``, if it is of this content."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for offset in np.linspace(0, max(0, size - 4096), 8).astype(int):
            file.seek(offset)
            digest.update(file.read(4096))
    stamp = {"bytes": size, "sha256": digest.hexdigest()}
    if known is not None and all(known.get(name) == value for name, value in stamp.items()):
        return known
    return stamp | _scan(path)


def _scan(path: Path) -> dict[str, list[Any]]:
    """Columns of the samples in a shard that have a picture; those that have none are named in the log."""
    samples: dict[str, dict[str, Any]] = {}
    last = "its beginning"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _add(samples, tar, member)
                last = member.name
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile itself says nothing
                raise tarfile.ReadError("no end of the archive")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is truncated or damaged after {last}: {error}; copy or make it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if empty := [key for key, sample in samples.items() if "picture" not in sample]:
        logger.warning("%s: %d samples without a picture are left out: %s", path, len(empty), _some(empty))
    rows = [_row(key, sample) for key, sample in samples.items() if "picture" in sample]
    columns = ("file", "offset", "size", "label", "caption")
    return {name: [row[i] for row in rows] for i, name in enumerate(columns)}


def _add(samples: dict[str, dict[str, Any]], tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Files a member under the key of its sample; members of other kinds are passed over."""
    folder, slash, file = member.name.removeprefix("./").rpartition("/")
    stem, _, kind = file.partition(".")
    part = "picture" if f".{kind.lower()}" in EXTENSIONS else kind.lower()
    if not member.isreg() or not stem or part not in ("picture", "cls", "txt", "json"):
        return
    sample = samples.setdefault(f"{folder}{slash}{stem}", {})
    if part in sample:
        raise ValueError(f"sample {folder}{slash}{stem} has two members of the kind {part}, the second {member.name}")
    if part == "picture":
        sample[part] = (kind, member.offset_data, member.size)
        return
    content = tar.extractfile(member)
    assert content is not None
    try:
        text = content.read().decode("utf-8-sig").strip()
        sample[part] = json.loads(text) if part == "json" else text
    except ValueError as error:
        raise ValueError(f"member {member.name}: {error}") from error


def _row(key: str, sample: dict[str, Any]) -> tuple[str, int, int, int | str | None, str | None]:
    kind, offset, size = sample["picture"]
    told = sample.get("json")
    told = told if isinstance(told, dict) else {}
    label = next((told[k] for k in _LABELS if type(told.get(k)) in (int, str)), None)
    caption = next((told[k] for k in _CAPTIONS if isinstance(told.get(k), str)), None)
    return f"{key}.{kind}", offset, size, sample.get("cls", label), sample.get("txt", caption)


@functools.lru_cache(maxsize=128)
def _opened(path: Path, content: str) -> IO[bytes]:
    """The file of a shard, kept open; ``content`` tells it from one that had this path before."""
    return path.open("rb", buffering=0)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
