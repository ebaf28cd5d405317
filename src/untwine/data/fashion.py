"""Fashion-MNIST (Xiao et al., arXiv 1708.07747) from its four IDX files, which Debian packages."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from untwine.data.base import Dataset
from untwine.data.images import mirrored
from untwine.diffusion.draws import Draws

PLACES = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"))
_NAMES = "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"


class FashionMNIST(Dataset):
    """70 000 grey images of ten kinds of clothing, 28 x 28 on a black ground of ``resolution``.

    Args:
        root: folder of the IDX files, plain or gzipped; default: where Debian's ``dataset-fashion-mnist`` puts them,
            then ``data/fashion-mnist``.
        part: the 60 000 training images or the 10 000 test images.
        resolution: side in pixels, at least 28; the rest is black border.
        flip: mirror half of the images at random.
    """

    num_classes = 10
    class_names: tuple[str, ...] = _NAMES
    files: ClassVar[dict[str, str]] = {"train": "train", "test": "t10k"}

    def __init__(
        self,
        root: Path | None = None,
        part: Literal["train", "test"] = "train",
        resolution: int = 32,
        flip: bool = False,
    ) -> None:
        if resolution < 28:
            raise ValueError(f"resolution must be at least 28, the size of the images, got {resolution}")
        folder = _find(root)
        prefix = self.files[part]
        images = read_idx(_one(folder, f"{prefix}-images-idx3-ubyte"), 3)
        labels = read_idx(_one(folder, f"{prefix}-labels-idx1-ubyte"), 1).astype(np.int64)
        if len(images) != len(labels) or images.shape[1:] != (28, 28):
            raise ValueError(f"{folder}: {images.shape} images do not belong to {len(labels)} labels")
        self.images, self.labels, self.flip, self.resolution = images, labels, flip, resolution
        self.sample_shape = (1, resolution, resolution)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        image = torch.from_numpy(self.images[position]).float() / 127.5 - 1
        if self.flip and mirrored(draws, index):
            image = image.flip(-1)
        before = (self.resolution - 28) // 2
        after = self.resolution - 28 - before
        return torch.nn.functional.pad(image, (before, after, before, after), value=-1.0)[None]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "count": len(self),
            "bytes": self.images.nbytes,
            "sha256": [hashlib.sha256(np.asarray(a).tobytes()).hexdigest() for a in (self.images, self.labels)],
        }


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file, plain or gzipped.

    Raises:
        ValueError: for a damaged file, or one with another number of dimensions; the message names it.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path} is not an IDX file of {dimensions}-dimensional bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if len(data) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} holds {len(data) - start} bytes, its header promises {' x '.join(map(str, shape))}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # writable, as torch wants it


def _find(root: Path | None) -> Path:
    places = PLACES if root is None else (Path(root),)
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(
        f"no Fashion-MNIST in {' or '.join(map(str, places))}: install Debian's dataset-fashion-mnist, or give "
        "data.root, a folder with the four IDX files"
    )


def _one(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ValueError(f"{folder} lacks {name}.gz")
