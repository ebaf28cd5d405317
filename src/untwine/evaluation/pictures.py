"""Sets of 8-bit pictures that can be read again: arrays, ``.npz`` files, folders and data sets."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from untwine.data.base import Dataset
from untwine.data.folder import ImageFolder
from untwine.data.images import center_crop, decode

logger = logging.getLogger(__name__)
LOSSY = (".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size, by position."""

    source: str
    """as messages and results call them"""
    count: int
    size: tuple[int, int]
    """(H, W) in pixels"""
    read: Callable[[int], np.ndarray]
    """position -> (H, W, 3 or 1) uint8"""
    fingerprint: Callable[[], dict[str, Any]]
    """JSON values that tell this set from others"""

    def batches(self, positions: Sequence[int], batch_size: int = 64) -> Iterator[Tensor]:
        """(B, 3 or 1, H, W) uint8 pictures at ``positions``."""
        for start in range(0, len(positions), batch_size):
            chosen = [self.read(int(p)) for p in positions[start : start + batch_size]]
            yield torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).contiguous()


def from_array(images: np.ndarray, source: str = "array") -> Pictures:
    """Of (N, H, W, C) or (N, H, W) uint8 levels.

    Raises:
        ValueError: for another shape or dtype.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8 or not len(images):
        raise ValueError(
            f"{source}: pictures must be (N, H, W, 3) or grey (N, H, W, 1) uint8 with N >= 1, got "
            f"{images.shape} {images.dtype}; convert floats with Protocol.to_uint8"
        )

    def fingerprint() -> dict[str, Any]:
        digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
        return {"count": len(images), "shape": list(images.shape[1:]), "sha256": digest}

    return Pictures(source, len(images), (images.shape[1], images.shape[2]), lambda k: images[k], fingerprint)


def from_dataset(dataset: Dataset, source: str) -> Pictures:
    """Of a data set, without augmentation.

    Raises:
        ValueError: for samples that are no pictures.
    """
    channels, height, width = dataset.sample_shape
    if channels not in (1, 3):
        raise ValueError(f"{source}: samples of {channels} channels are no pictures; give the data before the codec")

    def read(position: int) -> np.ndarray:
        levels = (dataset.read(position) + 1) * 127.5
        return levels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()

    return Pictures(source, len(dataset), (height, width), read, dataset.fingerprint)


def from_folder(root: Path, size: tuple[int, int] | None = None) -> Pictures:
    """Of every picture under ``root``, by name.

    Args:
        size: (height, width) that they shall have: a square one is made of larger and smaller pictures as for training
            (resized, and cropped at the centre). Default: all must be of one size.

    Raises:
        ValueError: for a missing folder, one without pictures, or, while reading, pictures of another size.
        CorruptImage: while reading; the message names the file.
    """
    folder = ImageFolder(root, 1, layout="flat")
    fits = size is not None and size[0] == size[1]
    first = decode(root / folder.files[0])
    height, width = size or (first.height, first.width)
    if lossy := [name for name in folder.files if name.lower().endswith(LOSSY)]:
        logger.warning("%s: %d pictures of a lossy format, such as %s", root, len(lossy), lossy[0])

    def read(position: int) -> np.ndarray:
        path = root / folder.files[position]
        image = decode(path)
        if image.size != (width, height):
            if not fits:
                raise ValueError(
                    f"{path} has {image.width} x {image.height} pixels, and the set {width} x {height}; all pictures "
                    "must be of one size"
                )
            image = center_crop(image, height)
        return np.asarray(image)

    return Pictures(str(root), len(folder), (height, width), read, folder.fingerprint)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays in an ``.npz`` file; nothing is unpickled.

    Raises:
        ValueError: for a missing or damaged file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from error


def open_samples(path: Path) -> Pictures:
    """Samples in an ``.npz`` (``arr_0``, as ADM and ``untwine sample`` write it) or a folder.

    A folder of ``untwine sample`` is read from its ``samples.npz``, since its grid is no sample.

    Raises:
        ValueError: where there is neither.
    """
    if path.is_dir():
        inner = path / "samples.npz"
        return open_samples(inner) if inner.is_file() else from_folder(path)
    if path.suffix != ".npz":
        raise ValueError(f"samples: {path} is no folder of pictures and no .npz file")
    arrays = read_npz(path)
    if "arr_0" not in arrays:
        raise ValueError(f"samples: {path} has no arr_0 (it has {', '.join(arrays) or 'nothing'})")
    return from_array(arrays["arr_0"], str(path))
