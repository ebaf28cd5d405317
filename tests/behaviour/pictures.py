"""Small image files, good and bad."""

import numpy as np
from PIL import Image


def save(path, levels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = levels if isinstance(levels, Image.Image) else Image.fromarray(np.asarray(levels, np.uint8), mode)
    image.save(path, **options)
    return path


def picture(seed, height=12, width=10, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def folder_of(root, count, pattern="{}.png"):
    for i in range(count):
        save(root / pattern.format(i), picture(i))
    return root


def broken_files(root):
    good = save(root / "good.png", picture(0, 64, 64)).read_bytes()
    jpeg = save(root / "good.jpg", picture(0, 64, 64)).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    bad = {
        "zero.png": b"",
        "text.png": b"not an image",
        "short.png": good[: len(good) // 2],
        "short.jpg": jpeg[: len(jpeg) // 2],
        "header.png": good[:20],
        "flipped.png": bytes(flipped),
        "zeros.jpg": bytes(1000),
    }
    for name, data in bad.items():
        (root / name).write_bytes(data)
    return list(bad)
