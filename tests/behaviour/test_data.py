"""Data sets, the order they are read in, and what bad files do to a run."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.behaviour.pictures import broken_files, folder_of, picture, save
from untwine.codecs.identity import IdentityCodec
from untwine.config import Component
from untwine.contracts import cat
from untwine.data import DATASETS
from untwine.data.base import CorruptImage, Dataset, Subset
from untwine.data.digits import Digits
from untwine.data.fashion import PLACES
from untwine.data.folder import ImageFolder
from untwine.data.images import center_crop, to_tensor
from untwine.data.loading import Loader, Order
from untwine.diffusion.draws import Draws


def test_digits():
    from sklearn.datasets import load_digits

    digits, source = Component("untwine.data:DATASETS", "digits").build(), load_digits()
    assert (len(digits), digits.sample_shape, digits.num_classes) == (1797, (1, 8, 8), 10)
    x = torch.stack([digits.read(i) for i in range(1797)])
    assert torch.allclose(x[:, 0], torch.tensor(source.images / 8 - 1, dtype=torch.float32), atol=1e-6)
    assert np.array_equal(digits.labels, source.target)
    assert digits.fingerprint() == Digits().fingerprint() != Digits(16).fingerprint()
    assert Digits(16).read(0).shape == (1, 16, 16)


# Those that need a prepared folder are built, and held to the same contract, by the tests of each.
@pytest.fixture(params=sorted(set(DATASETS) - {"buckets", "emoji", "hf", "latents", "shards"}))
def dataset(request, tmp_path):
    if request.param == "fashion" and not any(place.is_dir() for place in PLACES):
        pytest.skip("no Fashion-MNIST on this machine")
    if request.param == "folder":
        folder_of(tmp_path / "a", 9)
        folder_of(tmp_path / "b", 4)
    options = {"folder": {"root": str(tmp_path), "resolution": 8}}.get(request.param, {})
    return Component("untwine.data:DATASETS", request.param, options).build()


def test_every_registered_data_set_keeps_the_contract(dataset):
    x = dataset.read(len(dataset) - 1)
    assert x.shape == dataset.sample_shape
    assert x.dtype == torch.float32
    assert -1 <= x.min() <= x.max() <= 1
    assert torch.equal(x, dataset.read(len(dataset) - 1))
    assert len(dataset.class_names) == dataset.num_classes
    assert dataset.labels.shape == (len(dataset),)
    assert json.loads(json.dumps(dataset.fingerprint())) == dataset.fingerprint()
    assert dataset.fingerprint()["count"] == len(dataset)


def test_a_split_is_stratified_and_deterministic(dataset):
    for validation in (4, 0.3, 0, 1):
        train, held = dataset.split(validation, seed=3)
        count = round(0.3 * len(dataset)) if validation == 0.3 else validation
        assert (len(held), len(train)) == (count, len(dataset) - count)
        assert sorted([*train.positions, *held.positions]) == list(range(len(dataset)))
        exact = np.bincount(dataset.labels) * count / len(dataset)
        assert np.abs(np.bincount(held.labels, minlength=dataset.num_classes) - exact).max() < 1
        assert np.array_equal(held.positions, dataset.split(validation, seed=3)[1].positions)
        assert held.class_names == dataset.class_names
    train, held = dataset.split(4, seed=3)
    assert torch.equal(held.read(2), dataset.read(int(held.positions[2])))
    assert held.labels[2] == dataset.labels[held.positions[2]]
    assert not np.array_equal(held.positions, dataset.split(4, seed=4)[1].positions)
    assert train.fingerprint() != held.fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize("validation", [-1, 1797, 1.0, -0.5, 5000])
def test_bad_split(validation):
    with pytest.raises(ValueError, match=rf"validation must be a count in \[0, 1796\].*got {validation}"):
        Digits().split(validation, seed=0)


def test_flat_folder(tmp_path):
    folder_of(tmp_path, 3)
    save(tmp_path / "deep" / "Bäume 木.PNG", picture(9))
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "broken.png")
    folder = ImageFolder(tmp_path, 8)
    assert folder.files == ["0.png", "1.png", "2.png", "deep/Bäume 木.PNG"]
    assert (folder.layout, folder.labels, folder.num_classes, folder.num_ignored) == ("flat", None, 0, 3)
    assert torch.equal(folder.read(3), to_tensor(center_crop(Image.fromarray(picture(9)), 8)))
    assert ImageFolder(tmp_path, 8, channels=1).read(0).shape == (1, 8, 8)


def test_links_are_followed_but_not_in_circles(tmp_path, caplog):
    folder_of(tmp_path / "real" / "a", 2)
    os.symlink(tmp_path / "real", tmp_path / "real" / "a" / "loop")
    os.symlink(tmp_path / "real" / "a", tmp_path / "real" / "b")
    folder = ImageFolder(tmp_path / "real", 8)
    assert folder.files == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert folder.class_names == ("a", "b")
    assert "links to a folder above it" in caplog.text


def test_class_folders_and_an_empty_class(tmp_path, caplog):
    for name, count in {"zebra": 2, "ant": 1, "Äffchen": 1}.items():
        folder_of(tmp_path / name, count)
    (tmp_path / "bee").mkdir()
    (tmp_path / ".cache").mkdir()
    folder = ImageFolder(tmp_path, 8)
    assert folder.class_names == ("ant", "bee", "zebra", "Äffchen")
    assert folder.labels.tolist() == [0, 2, 2, 3]
    assert "class folders without images: bee" in caplog.text


def test_images_beside_class_folders(tmp_path, caplog):
    folder_of(tmp_path / "a", 1)
    folder_of(tmp_path, 1)
    assert ImageFolder(tmp_path, 8).layout == "flat"
    assert "read without classes" in caplog.text
    with pytest.raises(ValueError, match=r"images in no class folder: 0\.png"):
        ImageFolder(tmp_path, 8, layout="classes")


def test_captions_beside_images(tmp_path):
    folder_of(tmp_path, 2)
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"\ufeffnumber {i}: été\n", encoding="utf-8")
    (tmp_path / "README.txt").write_text("about")
    folder = ImageFolder(tmp_path, 8)
    assert (folder.layout, folder.captions) == ("captions", ["number 0: été", "number 1: été"])
    assert folder.split(1, seed=0)[1].captions[0] in folder.captions
    (tmp_path / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1 images have no caption \(1\.png\)"):
        ImageFolder(tmp_path, 8)
    assert ImageFolder(tmp_path, 8, layout="flat").captions is None
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"1\.txt: captions must be UTF-8"):
        ImageFolder(tmp_path, 8)


def test_captions_in_a_table_are_paired_by_name(tmp_path):
    folder_of(tmp_path, 2, "sub/{}.png")
    lines = [{"file_name": f"sub/{i}.png", "text": f"number {i}"} for i in (1, 0)]
    table = tmp_path / "metadata.jsonl"

    def write(entries):
        table.write_text("\n".join(map(json.dumps, entries)) + "\n\n")

    write(lines)
    assert ImageFolder(tmp_path, 8).captions == ["number 0", "number 1"]
    write([*lines[:1], {"file_name": "../x.png", "text": "outside"}])
    with pytest.raises(ValueError, match=r"no caption \(sub/0\.png\), 1 captions have no image \(\.\./x\.png\)"):
        ImageFolder(tmp_path, 8)
    write([*lines, lines[0]])
    with pytest.raises(ValueError, match=r"line 3: 'sub/1\.png' needs one text, given once"):
        ImageFolder(tmp_path, 8)
    for bad in ("{", "[]", '{"file_name": "a"}', "3"):
        table.write_text(bad)
        with pytest.raises(ValueError, match=r"metadata\.jsonl: line 1: expected"):
            ImageFolder(tmp_path, 8)


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(ValueError, match=r"root has no images: .*1 other files; images end in \.avif"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match=r"root must be an existing folder, got .*gone"):
        ImageFolder(tmp_path / "gone", 8)
    folder_of(tmp_path, 1)
    for options in ({"resolution": 0}, {"resolution": 8, "max_corrupt": 2.0}):
        with pytest.raises(ValueError, match="resolution must be at least 1 and max_corrupt in"):
            ImageFolder(tmp_path, **options)


def test_small_images(tmp_path, caplog):
    save(tmp_path / "dot.png", picture(0, 1, 1))
    save(tmp_path / "dot2.png", picture(0, 2, 2))
    save(tmp_path / "long.png", picture(0, 10, 5000))
    folder = ImageFolder(tmp_path, 16)
    assert [tuple(folder.read(i).shape) for i in range(3)] == [(3, 16, 16)] * 3
    assert caplog.text.count("smaller than 16 are upscaled, the first: ") == 1
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 images are smaller than resolution = 8 \(dot\.png, dot2\.png\)"):
        ImageFolder(tmp_path, 8, on_small="refuse")


def test_a_folder_with_other_content_has_another_fingerprint(tmp_path):
    folder_of(tmp_path, 4)
    before = ImageFolder(tmp_path, 8).fingerprint()
    (tmp_path / "3.png").rename(tmp_path / "4.png")
    renamed = ImageFolder(tmp_path, 8).fingerprint()
    save(tmp_path / "4.png", picture(77))
    assert len({json.dumps(f) for f in (before, renamed, ImageFolder(tmp_path, 8).fingerprint())}) == 3


def test_augmentation_is_a_function_of_the_counter(tmp_path):
    folder_of(tmp_path, 1)
    folder, draws = ImageFolder(tmp_path, 8, flip=True, crop="random"), Draws(0)
    plain = ImageFolder(tmp_path, 8).read(0)
    assert torch.equal(folder.read(0), plain)
    drawn = [folder.read(0, draws=draws, index=i) for i in range(40)]
    assert torch.equal(drawn[7], folder.read(0, draws=draws, index=7))
    assert len({x.numpy().tobytes() for x in drawn}) > 10
    mirrored = ImageFolder(tmp_path, 8, flip=True)
    flips = [torch.equal(mirrored.read(0, draws=draws, index=i), plain.flip(-1)) for i in range(100)]
    assert 30 < sum(flips) < 70


class Numbers(Dataset):
    """Position p reads as p; some positions are corrupt."""

    num_classes = 7

    def __init__(self, size, corrupt=(), max_corrupt=1.0):
        self.size, self.corrupt, self.max_corrupt = size, set(corrupt), max_corrupt
        self.labels = np.arange(size) % 7
        self.class_names = tuple("abcdefg")
        self.sample_shape = (1, 1, 1)

    def __len__(self):
        return self.size

    def read(self, position, *, draws=None, index=None):
        if position in self.corrupt:
            raise CorruptImage(f"file-{position}.png: broken")
        return torch.full((1, 1, 1), float(position))

    def fingerprint(self):
        return {"count": self.size}


def updates(dataset, count, **options):
    """The micro-batches of the first updates."""
    stream = iter(Loader(dataset, IdentityCodec(), seed=5, **options))
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def rows(micro_batches):
    batch = cat(micro_batches)
    return list(zip(batch.index.tolist(), batch.x0.flatten().tolist(), batch.condition.labels.tolist()))


@given(size=st.integers(1, 60), seed=st.integers(0, 99), epoch=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_epoch_is_a_permutation(size, seed, epoch):
    order = Order(Draws(seed), size)
    assert sorted(order(epoch * size + i) for i in range(size)) == list(range(size))


@given(
    size=st.integers(1, 50),
    per_rank=st.integers(1, 3),
    world_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_an_update_sees_the_same_samples_however_it_is_cut(size, per_rank, world_size, accumulation, start):
    dataset, batch_size = Numbers(size), per_rank * world_size * accumulation
    whole = updates(dataset, start + 3, batch_size=batch_size)
    parts = [
        updates(
            dataset,
            3,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            start_update=start,
        )
        for rank in range(world_size)
    ]
    for u in range(3):
        expected = rows(whole[start + u])
        assert [row[0] for row in expected] == list(range((start + u) * batch_size, (start + u + 1) * batch_size))
        assert all(len(part[u]) == accumulation for part in parts)
        in_order = [part[u][m] for m in range(accumulation) for part in parts]
        assert rows(in_order) == expected


def test_order_and_labels_follow_the_counter():
    order = Order(Draws(5), 10)
    seen = [row for update in updates(Numbers(10), 5, batch_size=4) for row in rows(update)]
    assert seen == [(c, order(c), order(c) % 7) for c in range(20)]
    assert seen[:10] != [(c - 10, p, y) for c, p, y in seen[10:]]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_change_nothing(tmp_path, workers):
    for name in "ab":
        folder_of(tmp_path / name, 5)
    (tmp_path / "a" / "bad.png").write_bytes(b"broken")
    folder = ImageFolder(tmp_path, 8, flip=True, crop="random", max_corrupt=0.2)
    options = {"batch_size": 6, "accumulation": 2}
    alone = updates(folder, 6, **options)
    state = torch.get_rng_state()
    helped = updates(folder, 6, num_workers=workers, **options)
    resumed = updates(folder, 2, num_workers=workers, start_update=4, **options)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip([x for u in alone + alone[4:] for x in u], [x for u in helped + resumed for x in u]):
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.condition.labels, b.condition.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_samples_are_replaced_counted_and_named_once(workers, caplog):
    dataset = Numbers(20, corrupt=[3, 4, 19], max_corrupt=0.2)
    loader = Loader(dataset, IdentityCodec(), seed=5, batch_size=5, num_workers=workers)
    stream = iter(loader)
    seen = [row for _ in range(8) for row in rows(next(stream))]
    stream.close()
    order = Order(Draws(5), 20)
    replaced = {3: 5, 4: 5, 19: 0}
    expected = [replaced.get(order(c), order(c)) for c in range(40)]
    assert seen == [(c, p, p % 7) for c, p in enumerate(expected)]
    assert loader.corrupt == {p: f"file-{p}.png: broken" for p in (3, 4, 19)}
    assert [caplog.text.count(f"file-{p}.png") for p in (3, 4, 19)] == [1, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("corrupt", [range(2), range(20)])
def test_too_many_corrupt_samples_stop_the_run_with_their_names(workers, corrupt):
    dataset = Numbers(20, corrupt, max_corrupt=0.05)
    with pytest.raises(CorruptImage, match=r"\d+ of 20 samples are corrupt.*max_corrupt = 0\.05.*\n  file-\d+\.png"):
        updates(dataset, 4, batch_size=5, num_workers=workers)


def test_broken_files_in_a_folder_of_a_hundred(tmp_path, caplog):
    folder_of(tmp_path, 93)
    bad = broken_files(tmp_path)[:5]
    folder = ImageFolder(tmp_path, 8, max_corrupt=0.1)
    batches = updates(folder, 20, batch_size=10)
    assert all(len(batch.x0) == 10 for update in batches for batch in update)
    assert [sum(f"/{name}: " in r.message for r in caplog.records) for name in bad] == [1] * 5
    with pytest.raises(CorruptImage, match="samples are corrupt"):
        updates(ImageFolder(tmp_path, 8), 20, batch_size=10)


class Deadly(Numbers):
    def read(self, position, *, draws=None, index=None):
        if index == 23 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(position)


def test_a_dead_worker_ends_the_run_with_a_message():
    with pytest.raises(
        RuntimeError, match=r"a data worker died \(SIGKILL\) while it read sample \d+ or a later one; .*num_workers"
    ):
        updates(Deadly(100), 20, batch_size=4, num_workers=2)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    folder_of(tmp_path / "images", 4)
    code = f"""
import itertools, multiprocessing, os, signal
from untwine.codecs.identity import IdentityCodec
from untwine.data.folder import ImageFolder
from untwine.data.loading import Loader
folder = ImageFolder({str(tmp_path / "images")!r}, 8)
stream = iter(Loader(folder, IdentityCodec(), seed=0, batch_size=2, num_workers=2))
next(stream)
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # the pipe closes when the last process that holds it has ended
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(run.stdout.split()) == 2


class Faulty(Numbers):
    def read(self, position, *, draws=None, index=None):
        raise RuntimeError("a bug in the data set")


def test_other_errors_of_a_worker_are_passed_on():
    with pytest.raises(RuntimeError, match="a bug in the data set") as caught:
        updates(Faulty(10), 1, batch_size=2, num_workers=1)
    assert "died" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 10, "accumulation": 2, "world_size": 2}, r"= 2 \* 2 = 4, got 10; the nearest .* are 8 and 12"),
        ({"batch_size": 3, "world_size": 4}, r"got 3; the nearest valid sizes are 4$"),
        ({"batch_size": 0}, r"must be at least 1 .* batch_size=0"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers and start_update must be >= 0, got -1 and 0"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, r"rank in \[0, world_size\).*rank=2"),
    ],
)
def test_bad_batch_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        Loader(Numbers(9), IdentityCodec(), seed=0, **options)


def test_bad_data_sets():
    with pytest.raises(ValueError, match="dataset is empty"):
        Loader(Subset(Numbers(3), np.array([], int)), IdentityCodec(), seed=0, batch_size=1)
    wrong = Numbers(3)
    wrong.labels = np.array([0, 7, 1])
    with pytest.raises(ValueError, match=r"labels must be within \[0, 6\], got \[7\]"):
        Loader(wrong, IdentityCodec(), seed=0, batch_size=1)


def test_the_codec_normalises_and_unlabelled_data_has_no_condition(tmp_path):
    folder_of(tmp_path, 3)
    folder = ImageFolder(tmp_path, 8)
    stream = iter(Loader(folder, IdentityCodec(scale=0.5), seed=5, batch_size=3))
    batch = next(stream)[0]
    order = Order(Draws(5), 3)
    assert torch.equal(batch.x0, torch.stack([folder.read(order(c)) for c in range(3)]) / 2)
    assert batch.condition.keys() == frozenset()


def test_log_levels(tmp_path, caplog):
    folder_of(tmp_path, 1)
    with caplog.at_level(logging.INFO):
        ImageFolder(tmp_path, 8)
    assert "1 images, layout flat, 0 other files" in caplog.text
