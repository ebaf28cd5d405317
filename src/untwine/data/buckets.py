"""Aspect-ratio buckets: pictures are trained on in shapes near their own instead of as squares.

The shapes have about the area of the square. Each picture belongs to the one whose aspect ratio is nearest, is resized
to cover it and loses only what stands out; of the square shape that is the square sample, bit for bit. All samples of
an update have one shape (:class:`untwine.data.loading.Order`), so any number of ranks and micro-batches is in step.
"""

from __future__ import annotations

import io
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor

from untwine.codecs.base import Codec
from untwine.data.base import CorruptImage, Dataset, Subset
from untwine.data.folder import ImageFolder
from untwine.data.images import MAX_PIXELS, decode, mirrored, to_tensor
from untwine.data.shards import Shards
from untwine.diffusion.draws import Draws

logger = logging.getLogger(__name__)


class Buckets(Subset):
    """Pictures of a folder or of shards, the training part of which comes in shapes of several aspect ratios.

    Everything else, from validation to sampling, stays at the square of ``source``. An epoch has the full batches of
    each shape; the rest of a shape, fewer than ``batch_size`` pictures and others each time, is left out of it. The
    header of every picture is read at the start.

    Args:
        source: of kind folder or shards; its ``resolution`` squared is about the area of all shapes.
        unit: what height and width are multiples of, in pixels: a multiple of the codec's factor times the patch size.
        max_ratio: longest aspect ratio of a shape, >= 1.

    Raises:
        ValueError: for another source, and for shapes that cannot be made.
    """

    def __init__(self, source: Dataset, *, unit: int = 32, max_ratio: float = 2.0) -> None:
        if not isinstance(source, ImageFolder | Shards):
            raise ValueError(
                f"source must be pictures with sizes of their own (kind folder or shards), got {type(source).__name__}"
            )
        super().__init__(source, np.arange(len(source)))
        self.source = source
        self.shapes = shapes_of(source.sample_shape[1], unit, max_ratio)
        with ThreadPoolExecutor() as pool:
            sizes = np.array(list(pool.map(lambda k: size_of(source, k), range(len(source)))), np.float64)
        self.buckets = nearest(sizes, self.shapes)
        counts = np.bincount(self.buckets, minlength=len(self.shapes))
        told = ", ".join(f"{h} x {w}: {n}" for (h, w), n in zip(self.shapes, counts) if n)
        logger.info("buckets (height x width: pictures): %s", told)

    def fingerprint(self) -> dict[str, Any]:
        return {**self.source.fingerprint(), "shapes": [list(shape) for shape in self.shapes]}

    def split(self, validation: int | float, seed: int) -> tuple[Dataset, Dataset]:
        training, held_out = super().split(validation, seed)
        assert isinstance(training, Subset)
        return Bucketed(self, training.positions), held_out

    def check(self, codec: Codec, model: Any) -> None:
        """Refuses a model or codec that cannot take the shapes.

        Raises:
            ValueError: saying which, and what to change.
        """
        if getattr(model, "square_only", False):
            raise ValueError(
                f"data of kind buckets has shapes that are not square, and this {type(model).__name__} has positions "
                "for one square grid only; use a model of any grid, or the source without buckets"
            )
        patch = getattr(getattr(model, "config", None), "patch_size", 1)
        for height, width in self.shapes:
            latent = codec.latent_shape((self.sample_shape[0], height, width))
            if any(size % patch for size in latent[1:]):
                raise ValueError(
                    f"data.unit: pictures of {height} x {width} become latents of {latent[1]} x {latent[2]}, which do "
                    f"not divide into patches of {patch} x {patch}; use a multiple of the codec's factor times {patch}"
                )


class Bucketed(Subset):
    """The samples of buckets at the given positions, each in the shape of its bucket."""

    def __init__(self, dataset: Buckets, positions: np.ndarray) -> None:
        super().__init__(dataset, positions)
        self.source, self.shapes, self.buckets = dataset.source, dataset.shapes, dataset.buckets[positions]

    def read(self, position: int, *, draws: Draws | None = None, index: int | None = None) -> Tensor:
        """(C, H, W) float32 in [-1, 1] of the bucket's shape."""
        source, original = self.source, int(self.positions[position])
        name = None if source.names is None else f"{source.root}/{source.names[original]}"
        image = decode(_file(source, original), source.prepare.channels, name=name)
        random = source.crop == "random" and draws is not None
        u = draws.uniform("augment/crop", (3,), [index or 0])[0].tolist() if random and draws else None
        try:
            height, width = self.shapes[self.buckets[position]]
            image = fit(image, height, width, u)
        except CorruptImage as error:
            raise CorruptImage(f"{name}: {error}") from error
        x = to_tensor(image, source.prepare.channels)
        return x.flip(-1) if source.flip and mirrored(draws, index) else x


def shapes_of(side: int, unit: int, max_ratio: float) -> list[tuple[int, int]]:
    """(H, W) in multiples of ``unit``, from the tallest to the widest: ``side**2`` pixels but for that rounding."""
    if unit < 1 or side % unit or max_ratio < 1:
        raise ValueError(
            f"unit must divide the source's resolution {side}, and max_ratio be at least 1, got {unit} and {max_ratio}"
        )
    wide = []
    for width in range(side, int(side * max_ratio) + 1, unit):
        height = max(unit, round(side**2 / width / unit) * unit)
        if width <= height * max_ratio:
            wide.append((height, width))
    return [(w, h) for h, w in reversed(wide[1:])] + wide


def nearest(sizes: np.ndarray, shapes: list[tuple[int, int]]) -> np.ndarray:
    """(n,) which of the shapes (H, W) has the aspect ratio nearest to that of each of the sizes (n, 2)."""
    ratios = np.log(sizes[:, 1] / sizes[:, 0])
    known = np.log([width / height for height, width in shapes])
    return np.abs(ratios[:, None] - known).argmin(1)


def size_of(source: ImageFolder | Shards, position: int) -> tuple[int, int]:
    """(H, W) of a picture as its header tells, upright; that of a square where there is none to read."""
    try:
        file = _file(source, position)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
            lies = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (width, height) if lies else (height, width)
    except Exception:  # damaged files are found and counted when they are read
        return (1, 1)


def fit(image: Image.Image, height: int, width: int, u: list[float] | None = None) -> Image.Image:
    """The picture in the given shape: resized to cover it, then cut, in the middle unless ``u`` says otherwise.

    Args:
        u: scale, left and top in [0, 1); at the largest scale 0.8 of each side is seen.

    Raises:
        CorruptImage: if the aspect ratio is so extreme that the resized picture would be too large.
    """
    scale, left, top = u or (0.0, 0.5, 0.5)
    image = _cover(image, round(height * (1 + scale / 4)), round(width * (1 + scale / 4)))
    across, down = image.width - width, image.height - height
    x, y = (across // 2, down // 2) if u is None else (int(left * (across + 1)), int(top * (down + 1)))
    return image.crop((x, y, x + width, y + height))


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resized to the smallest size that covers the shape, as :func:`~untwine.data.images.resize_short_side` does."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise CorruptImage(f"resized to {size[0]} x {size[1]} it would exceed {MAX_PIXELS} pixels")
    return image.resize(size, Image.Resampling.BICUBIC)


def _file(source: ImageFolder | Shards, position: int) -> Any:
    """Path or content of a picture's file."""
    return source.content(position) if isinstance(source, Shards) else source.root / source.files[position]
