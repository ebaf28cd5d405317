"""The 1797 handwritten digits that come with scikit-learn: real data without a download."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from untwine.data.base import Dataset
from untwine.data.images import center_crop, to_tensor
from untwine.diffusion.draws import Draws


class Digits(Dataset):
    """8 x 8 grey images of the digits 0-9 (UCI ML hand-written digits), ink white on black.

    Args:
        resolution: side in pixels; other than 8, the images are resized (bicubic).
    """

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, resolution: int = 8) -> None:
        if resolution < 1:
            raise ValueError(f"resolution must be at least 1, got {resolution}")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the digits come with scikit-learn: pip install untwine[digits]") from error
        images, labels = load_digits(return_X_y=True)
        levels = images.reshape(-1, 8, 8).astype(np.float32) * (255 / 16)
        if resolution != 8:
            levels = np.stack([np.asarray(center_crop(Image.fromarray(x), resolution)) for x in levels])
        self.images = torch.stack([to_tensor(x, channels=1) for x in levels])
        self.labels = np.asarray(labels, np.int64)
        self.sample_shape = (1, resolution, resolution)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        return self.images[position].clone()

    def fingerprint(self) -> dict[str, Any]:
        data = self.images.numpy().tobytes()
        return {"count": len(self), "bytes": len(data), "sha256": [hashlib.sha256(data).hexdigest()]}
