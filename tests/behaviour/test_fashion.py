"""Fashion-MNIST from IDX files: small ones written here, and Debian's where they are installed."""

import gzip
import struct

import numpy as np
import pytest
import torch

from untwine.data import fashion
from untwine.data.fashion import PLACES, FashionMNIST, read_idx
from untwine.diffusion.draws import Draws


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)


@pytest.fixture
def root(tmp_path, images):
    for prefix, part in {"train": images, "t10k": images[:2]}.items():
        labels = np.arange(len(part), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(part)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_images_stand_in_the_middle_of_black(root, images):
    data = FashionMNIST(root)
    assert (len(data), data.sample_shape, data.num_classes, data.labels.tolist()) == (6, (1, 32, 32), 10, [*range(6)])
    x = data.read(3)
    assert torch.equal(x[0, 2:30, 2:30], torch.from_numpy(images[3]) / 127.5 - 1)
    border = torch.ones(32, 32, dtype=bool)
    border[2:30, 2:30] = False
    assert (x[0, border] == -1).all()
    assert torch.equal(FashionMNIST(root, resolution=28).read(3), x[:, 2:30, 2:30])
    assert torch.equal(FashionMNIST(root, resolution=31).read(3)[0, 1:29, 1:29], x[0, 2:30, 2:30])
    assert len(FashionMNIST(root, part="test")) == 2


def test_flips_follow_the_counter(root):
    data, draws = FashionMNIST(root, flip=True), Draws(0)
    plain = data.read(0)
    drawn = [data.read(0, draws=draws, index=i) for i in range(60)]
    flipped = [torch.equal(x, plain.flip(-1)) for x in drawn]
    assert all(torch.equal(x, plain) or f for x, f in zip(drawn, flipped))
    assert 15 < sum(flipped) < 45
    assert torch.equal(drawn[9], data.read(0, draws=draws, index=9))


def test_a_fingerprint_tells_content(root, images):
    before = FashionMNIST(root).fingerprint()
    assert before == FashionMNIST(root, flip=True).fingerprint() != FashionMNIST(root, part="test").fingerprint()
    images[2, 3, 4] ^= 1
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    assert FashionMNIST(root).fingerprint() != before


def test_damaged_files_are_named(tmp_path, images):
    good = idx(images)
    cases = {
        "zeros.gz": (b"", "cannot be read|is not an IDX file"),
        "text.gz": (b"no gzip", "cannot be read"),
        "short.gz": (gzip.compress(good)[:-200], "cannot be read"),
        "flipped.gz": (flip_byte(gzip.compress(good)), "cannot be read"),
        "empty": (b"", "is not an IDX file of 3-dimensional bytes"),
        "magic": (b"\x00\x00\x09" + good[3:], "is not an IDX file of 3-dimensional bytes"),
        "labels": (idx(images[0, 0]), "is not an IDX file of 3-dimensional bytes"),
        "header": (good[:10], "is not an IDX file of 3-dimensional bytes"),
        "truncated": (good[:-1], r"holds 4703 bytes, its header promises 6 x 28 x 28"),
        "longer": (good + b"x", r"holds 4705 bytes, its header promises 6 x 28 x 28"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*({message})"):
            read_idx(tmp_path / name, 3)
    (tmp_path / "good.gz").write_bytes(gzip.compress(good))
    assert np.array_equal(read_idx(tmp_path / "good.gz", 3), images)


def flip_byte(data):
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    return bytes(damaged)


def test_files_that_do_not_belong_together(root):
    (root / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match=r"\(6, 28, 28\) images do not belong to 5 labels"):
        FashionMNIST(root)
    (root / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"lacks train-labels-idx1-ubyte\.gz"):
        FashionMNIST(root)


def test_missing_folders_and_bad_options(root, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no Fashion-MNIST in .*nowhere: install Debian's dataset-fashion-mnist"):
        FashionMNIST(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="resolution must be at least 28, the size of the images, got 27"):
        FashionMNIST(root, resolution=27)
    monkeypatch.setattr(fashion, "PLACES", (tmp_path / "first", root))
    assert len(FashionMNIST()) == 6


@pytest.mark.skipif(not PLACES[0].is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_files():
    train, test = FashionMNIST(), FashionMNIST(part="test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    mean = (train.images[::7] / 255).mean()
    assert mean == pytest.approx(0.2860, abs=0.002)  # the published mean of the training set
    assert train.class_names[train.labels[0]] == "Ankle boot"  # as the authors show it
