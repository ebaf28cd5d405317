"""Image files -> pixels, by one documented rule for every mode.

- Orientation in EXIF is applied; of an animation, the first frame is taken.
- Transparency (LA, PA, RGBA, a transparent palette entry or colour) is composed over white.
- CMYK, YCbCr, LAB, HSV, palette, bilevel and grey images are converted as Pillow does; grey becomes three equal
  channels, colour becomes grey by ITU-R 601 luma.
- 16-bit grey (I;16, or I with values in 0..65535) keeps its precision: level / 257, as float.
- Images over 64 megapixels are refused from their header; so are float images, whose range is unknown.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from untwine.data.base import CorruptImage
from untwine.diffusion.draws import Draws

MAX_PIXELS = 64_000_000


def decode(source: str | Path | bytes, channels: int = 3, *, name: str | None = None) -> Image.Image:
    """The picture in a file, mode RGB (3 channels), L (1 channel) or F (grey of 16 bits, levels 0..255).

    Args:
        source: a path, or the content of a file.
        name: what messages call it; default: the path.

    Raises:
        CorruptImage: whatever is wrong with the file, one message naming it.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CorruptImage(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
            image.load()
            return _convert(ImageOps.exif_transpose(image), channels)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        raise CorruptImage(f"{name or source!s}: {error or type(error).__name__}") from error


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float32)
        if levels.min() < 0 or levels.max() > 65535:
            raise CorruptImage(f"integer levels {levels.min():g}..{levels.max():g} are outside 0..65535")
        return Image.fromarray(levels / 257)
    if image.mode == "F":
        raise CorruptImage("float levels have no known range; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if channels == 3 else image.convert("L")


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """Resizes to a short side of ``side`` pixels as ADM does: halved by box filter while it can be, then bicubic.

    Raises:
        CorruptImage: if the aspect ratio is so extreme that the result would be too large.
    """
    width, height = image.size
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = side / min(width, height)
    width, height = round(width * scale), round(height * scale)
    if width * height > MAX_PIXELS:
        raise CorruptImage(f"resized to {width} x {height} it would exceed {MAX_PIXELS} pixels")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central ``size`` x ``size`` square at a short side of ``size`` (ADM's evaluation crop, pixel for pixel)."""
    image = resize_short_side(image, size)
    return _square(image, size, (image.width - size) // 2, (image.height - size) // 2)


def random_crop(image: Image.Image, size: int, u: Tensor) -> Image.Image:
    """A square of at least 0.8 of the short side; ``u`` (3,) in [0, 1) chooses its scale, left and top."""
    scale, left, top = u.tolist()
    image = resize_short_side(image, size + int(scale * (int(size / 0.8) - size + 1)))
    return _square(image, size, int(left * (image.width - size + 1)), int(top * (image.height - size + 1)))


def _square(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image | np.ndarray, channels: int = 3) -> Tensor:
    """(channels, H, W) float32 in [-1, 1] from levels 0..255; grey is repeated, overshoot of a filter is clipped."""
    levels = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
    levels = levels[None].expand(channels, -1, -1) if levels.ndim == 2 else levels.permute(2, 0, 1)
    return levels.clamp(-1, 1).contiguous()


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes a square sample; augmentation is a function of (draws, index), and off without draws."""

    resolution: int
    """side in pixels"""
    channels: int = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """mirror half of the samples"""

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"resolution must be at least 1, got {self.resolution}")

    def __call__(self, image: Image.Image, draws: Draws | None = None, index: int | None = None) -> Tensor:
        """(channels, resolution, resolution) float32 in [-1, 1]."""
        if self.crop == "center" or draws is None:
            image = center_crop(image, self.resolution)
        else:
            image = random_crop(image, self.resolution, draws.uniform("augment/crop", (3,), [index or 0])[0])
        x = to_tensor(image, self.channels)
        return x.flip(-1) if self.flip and mirrored(draws, index) else x


def mirrored(draws: Draws | None, index: int | None) -> bool:
    """Whether the flip augmentation mirrors sample ``index``: half of them, none without draws."""
    return draws is not None and bool(draws.uniform("augment/flip", (), [index or 0]) < 0.5)
