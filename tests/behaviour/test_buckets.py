"""Aspect-ratio buckets: which shape each picture gets, the order of the shapes, and what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.behaviour.pictures import picture, save
from tests.behaviour.test_shards import packed
from tests.tiny import tiny
from tests.vaes import save_vae
from untwine.codecs.identity import IdentityCodec
from untwine.codecs.vae import VAECodec
from untwine.config import Component
from untwine.contracts import cat
from untwine.data.base import CorruptImage
from untwine.data.buckets import Bucketed, Buckets, fit, nearest, shapes_of, size_of
from untwine.data.digits import Digits
from untwine.data.encoding import Encoder
from untwine.data.folder import ImageFolder
from untwine.data.images import center_crop, random_crop
from untwine.data.loading import Loader, Order
from untwine.data.shards import Shards
from untwine.diffusion.draws import Draws
from untwine.training.trainer import Trainer

SIZES = [(40, 40), (41, 40), (30, 50), (31, 52), (64, 30), (64, 33), (20, 90)]
"""(H, W) of the pictures, of which there are seven each"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i in range(49):
        save(root / f"class-{i % 2}" / f"{i:02d}.png", picture(i, *SIZES[i % 7]))
    return root


def buckets(root, **options):
    return Buckets(ImageFolder(root, 16, **options), unit=4, max_ratio=2.0)


def updates(dataset, count, **options):
    stream = iter(Loader(dataset, IdentityCodec(), seed=5, **options))
    try:
        return [cat(next(stream)) for _ in range(count)]
    finally:
        stream.close()


def test_the_shapes():
    assert shapes_of(16, 4, 2.0) == [(24, 12), (20, 12), (16, 16), (12, 20), (12, 24)]
    for side, unit, ratio in ((16, 4, 2.0), (256, 32, 2.0), (256, 16, 4.0), (512, 64, 3.0), (64, 64, 1.0)):
        shapes = shapes_of(side, unit, ratio)
        assert (side, side) in shapes
        assert {(w, h) for h, w in shapes} == set(shapes)
        ratios = [w / h for h, w in shapes]
        assert ratios == sorted(set(ratios))
        assert max(ratios) <= ratio
        for height, width in shapes:
            assert height % unit == width % unit == 0
            assert abs(height * width - side**2) <= unit / 2 * max(height, width)
    assert shapes_of(256, 64, 1.7) == [(320, 192), (256, 256), (192, 320)]
    for side, unit, ratio in ((16, 5, 2.0), (16, 0, 2.0), (16, 4, 0.5)):
        with pytest.raises(ValueError, match="unit must divide the source's resolution 16, and max_ratio be at least"):
            shapes_of(side, unit, ratio)


def test_every_picture_has_the_nearest_shape(root):
    data = buckets(root)
    training, held_out = data.split(7, seed=0)
    assert isinstance(training, Bucketed)
    assert len({tuple(training.read(i).shape) for i in range(len(training))}) == len(np.unique(data.buckets)) >= 3
    for i in range(len(training)):
        height, width = SIZES[int(training.names[i][-6:-4]) % 7]
        shape = training.read(i).shape[1:]
        distances = {abs(np.log(width / height) - np.log(w / h)): (h, w) for h, w in data.shapes}
        assert tuple(shape) == distances[min(distances)]
    assert {tuple(held_out.read(i).shape) for i in range(7)} == {(3, 16, 16)} == {data.sample_shape}
    assert torch.equal(data.read(3), data.source.read(3))
    assert (data.labels.tolist(), data.class_names) == (data.source.labels.tolist(), ("class-0", "class-1"))
    assert sorted([*training.positions, *held_out.positions]) == list(range(49))


def test_a_picture_keeps_its_aspect_ratio():
    # rows of one level each: 60 x 90 into 16 x 24 is a plain resize; into 16 x 16 it loses its left and right
    image = Image.fromarray(np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[:, None], 90, axis=1))
    assert fit(image, 16, 24).size == (24, 16)
    whole = np.asarray(fit(image, 16, 24), np.float32)
    assert np.abs(whole[:, :1] - whole).max() == 0
    assert np.abs(whole[:, 0] - np.linspace(5.5, 230, 16)).max() < 4
    columns = Image.fromarray(np.repeat(np.arange(0, 180, 2, dtype=np.uint8)[None], 60, axis=0))
    cut = np.asarray(fit(columns, 16, 16), np.float32)[0]
    assert 25 < cut[0] < 40
    assert 140 < cut[-1] < 155
    for size in ((16, 16), (33, 100), (257, 64), (15, 17), (3, 500)):
        source = Image.fromarray(picture(1, *size))
        assert np.array_equal(np.asarray(fit(source, 16, 16)), np.asarray(center_crop(source, 16)))
        for height, width in ((12, 20), (20, 12), (16, 64)):
            assert fit(source, height, width).size == (width, height)
            assert fit(source, height, width, [0.99, 0.99, 0.99]).size == (width, height)
    flat = torch.zeros(3)
    assert np.array_equal(fit(source, 16, 16, flat.tolist()), random_crop(source, 16, flat))
    with pytest.raises(CorruptImage, match="it would exceed 64000000 pixels"):
        fit(Image.new("RGB", (1, 60000)), 256, 256)


def test_augmentation_follows_the_source(root):
    data = buckets(root, flip=True, crop="random").split(0, seed=0)[0]
    draws = Draws(0)
    plain = buckets(root).split(0, seed=0)[0].read(2)
    assert torch.equal(data.read(2), plain)
    drawn = [data.read(2, draws=draws, index=i) for i in range(20)]
    assert torch.equal(drawn[7], data.read(2, draws=draws, index=7))
    assert {x.shape for x in drawn} == {plain.shape}
    assert len({x.numpy().tobytes() for x in drawn}) > 10
    mirror = buckets(root, flip=True).split(0, seed=0)[0]
    flips = [torch.equal(mirror.read(2, draws=draws, index=i), plain.flip(-1)) for i in range(60)]
    assert 15 < sum(flips) < 45


def test_sizes_are_read_from_headers(root, tmp_path):
    turned = Image.fromarray(picture(0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes(b"broken")
    folder = ImageFolder(tmp_path, 16)
    assert [size_of(folder, i) for i in range(2)] == [(40, 20), (1, 1)]
    assert folder.read(0).shape == (3, 16, 16)
    assert nearest(np.array([[40, 20], [1, 1.0]]), [(24, 12), (16, 16)]).tolist() == [0, 1]
    folder = ImageFolder(root, 16)
    assert [size_of(folder, i) for i in range(49)] == [SIZES[int(name[-6:-4]) % 7] for name in folder.files]


def test_shards_have_the_buckets_of_their_folder(root, tmp_path):
    source = {"kind": "shards", "root": str(packed(ImageFolder(root, 16), tmp_path, 20)), "resolution": 16}
    shards = Component("untwine.data:DATASETS", "buckets", {"source": source, "unit": 4}).build()
    assert isinstance(shards.source, Shards)
    both = [updates(data.split(9, 0)[0], 3, batch_size=4) for data in (buckets(root), shards)]
    assert all(torch.equal(a.x0, b.x0) for a, b in zip(*both, strict=True))


def test_an_epoch_shows_every_picture_but_the_rest_of_each_bucket():
    ids = np.array([0] * 10 + [1] * 7 + [3] * 9 + [4] * 2)
    order = Order(Draws(1), 28, ids, 4)
    assert order.size == 8 + 4 + 8
    seen = np.array([order(c) for c in range(6 * order.size)]).reshape(6, -1)
    for epoch in seen:
        assert len(set(epoch)) == order.size
        assert [len(set(ids[batch])) for batch in epoch.reshape(-1, 4)] == [1] * 5
    assert set(seen.flatten()) == set(range(26))  # what one epoch leaves out, another shows
    turns = ids[seen[:, ::4]]
    assert len({tuple(turn) for turn in turns}) > 1
    whole = Order(Draws(1), 28)
    assert sorted(whole(c) for c in range(28)) == list(range(28))


@pytest.mark.parametrize("world_size, accumulation, workers", [(2, 1, 0), (1, 2, 0), (4, 1, 0), (2, 2, 1)])
def test_the_order_is_the_same_however_an_update_is_cut(root, world_size, accumulation, workers):
    data = buckets(root).split(9, seed=0)[0]
    whole = updates(data, 12, batch_size=4)
    assert len({tuple(update.x0.shape) for update in whole}) >= 3
    for start in (0, 5):
        parts = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "num_workers": workers, "start_update": start}
            stream = iter(Loader(data, IdentityCodec(), seed=5, batch_size=4, accumulation=accumulation, **options))
            parts.append([next(stream) for _ in range(12 - start)])
            stream.close()
        for u, update in enumerate(whole[start:]):
            cut = cat([part[u][m] for m in range(accumulation) for part in parts])
            assert torch.equal(cut.x0, update.x0)
            assert torch.equal(cut.index, update.index)
            assert torch.equal(cut.condition.labels, update.condition.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_picture_is_replaced_by_one_of_its_shape(tmp_path, workers, caplog):
    for i in range(12):
        save(tmp_path / f"{i:02d}.png", picture(i, *[(20, 20), (20, 40)][i % 2]))
    good = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(good[: len(good) // 2])  # its header is whole
    data = Buckets(ImageFolder(tmp_path, 8, max_corrupt=0.5), unit=2).split(0, seed=0)[0]
    seen = updates(data, 6, batch_size=3, num_workers=workers)
    assert {tuple(update.x0.shape) for update in seen} == {(3, 3, 8, 8), (3, 3, 6, 12)}
    assert sum("03.png" in record.message for record in caplog.records) == 1
    for i in range(1, 12, 2):
        (tmp_path / f"{i:02d}.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(CorruptImage, match=r"no sample of a bucket can be read: .*\d\d\.png"):
        updates(data, 6, batch_size=3, num_workers=workers)


def test_buckets_smaller_than_a_batch_are_said(root, caplog):
    data = buckets(root).split(0, seed=0)[0]
    updates(data, 1, batch_size=12)
    assert "pictures are in buckets of fewer than batch_size = 12: " in caplog.text
    assert "they are never seen" in caplog.text
    with pytest.raises(ValueError, match=r"49 pictures are in buckets of fewer than batch_size = 64: .*; lower data"):
        Loader(data, IdentityCodec(), seed=0, batch_size=64)


def recipe(root, **changes):
    source = {"kind": "folder", "root": str(root), "resolution": 16, "flip": True}
    data = {"kind": "buckets", "source": source, "unit": 4, "max_ratio": 2.0}
    train = {"train.batch_size": 4, "train.num_steps": 8, "train.validation": 9, "train.log_every": 2}
    return tiny(**{"data": data, "model.patch_size": 2, **train, **changes})


def noting(shapes, update, batches):
    shapes.extend(tuple(batch.x0.shape) for batch in batches)
    update(batches)


def test_a_run_on_buckets_goes_on_where_it_was_stopped(root, tmp_path):
    shapes = {}

    def run(name, *stops):
        for stop in (*stops, None):
            trainer = Trainer(recipe(root, **{"train.sample_every": 8}), tmp_path / name, device="cpu")
            trainer._update = partial(noting, shapes.setdefault(name, []), trainer._update)
            trainer.fit(until=stop)
        return trainer

    whole, stopped = run("whole"), run("stopped", 3, 5)
    assert len(shapes["whole"]) == 8
    assert len(set(shapes["whole"])) >= 2
    assert shapes["stopped"] == shapes["whole"]
    a, b = (run.networks.tensors() for run in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.metrics["validation_loss"] == stopped.metrics["validation_loss"]
    assert Image.open(tmp_path / "whole" / "samples" / "step-8.png").size[0] > 0
    assert whole.latent_shape == (3, 16, 16)


def test_what_cannot_take_the_shapes_is_refused(root, tmp_path):
    square = {"kind": "dit", "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "num_positions": 64}
    with pytest.raises(ValueError, match="shapes that are not square, and this DiT has positions for one square grid"):
        Trainer(recipe(root, model=square), tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=r"data\.unit: pictures of 24 x 12 .* patches of 8 x 8; use a multiple"):
        Trainer(recipe(root, **{"model.patch_size": 8}), tmp_path / "run", device="cpu")
    odd = Buckets(ImageFolder(root, 15), unit=3)
    with pytest.raises(ValueError, match="cannot restore samples of shape"):
        odd.check(VAECodec(str(save_vae(tmp_path / "vae")), mean=(0.0,), std=(1.0,)), None)
    with pytest.raises(ValueError, match=r"source must be pictures with sizes of their own .*, got Digits"):
        Buckets(Digits())
    with pytest.raises(ValueError, match="data of kind buckets has several shapes, and a cache holds one"):
        Encoder(buckets(root), IdentityCodec(), tmp_path / "cache")
    assert not (tmp_path / "run").exists()
