"""Tar shards: the same data set as the folder that they were made of, and what is said of bad ones."""

import io
import json
import os
import pickle
import re
import tarfile
import threading

import pytest
import torch
from PIL import Image

from tests.behaviour.pictures import broken_files, folder_of, picture
from tests.tiny import tiny
from untwine.codecs.identity import IdentityCodec
from untwine.config import Component
from untwine.contracts import cat
from untwine.data import shards as module
from untwine.data.base import CorruptImage
from untwine.data.folder import ImageFolder
from untwine.data.loading import Loader
from untwine.data.shards import INDEX, Shards
from untwine.diffusion.draws import Draws
from untwine.training.trainer import Trainer


def shard(path, members):
    """A tar file of ``(name, content)`` members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(seed, *size):
    file = io.BytesIO()
    Image.fromarray(picture(seed, *size)).save(file, "png")
    return file.getvalue()


def packed(folder, out, per_shard=4):
    """The pictures of a folder in shards, with the names of their folders as classes."""
    for start in range(0, len(folder), per_shard):
        members = []
        for position in range(start, min(start + per_shard, len(folder))):
            stem = folder.files[position].rpartition(".")[0]
            members.append((folder.files[position], (folder.root / folder.files[position]).read_bytes()))
            if folder.labels is not None:
                members.append((f"{stem}.cls", folder.class_names[folder.labels[position]]))
        shard(out / f"train-{start // per_shard:03d}.tar", members)
    return out


@pytest.fixture
def folder(tmp_path):
    for name, count in {"ant": 6, "bee": 4, "cow": 3}.items():
        folder_of(tmp_path / "pictures" / name, count)
    return tmp_path / "pictures"


@pytest.fixture
def root(folder, tmp_path):
    return packed(ImageFolder(folder, 8), tmp_path / "shards")


def same_batches(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.x0, y.x0)
        assert torch.equal(x.index, y.index)
        assert torch.equal(x.condition.labels, y.condition.labels)


def updates(dataset, count, **options):
    stream = iter(Loader(dataset, IdentityCodec(), seed=5, **options))
    try:
        return [cat(next(stream)) for _ in range(count)]
    finally:
        stream.close()


def test_shards_are_the_folder_that_they_were_made_of(folder, root):
    options = {"resolution": 8, "flip": True, "crop": "random"}
    pictures, shards = ImageFolder(folder, **options), Shards(root, **options)
    assert len(shards) == 13
    assert (shards.class_names, shards.num_classes, shards.captions) == (("ant", "bee", "cow"), 3, None)
    assert shards.labels.tolist() == pictures.labels.tolist()
    assert shards.names == [f"train-{i // 4:03d}.tar/{name}" for i, name in enumerate(pictures.files)]
    assert (shards.sample_shape, shards.flip, shards.crop) == (pictures.sample_shape, True, "random")
    draws = Draws(1)
    for i in range(13):
        assert torch.equal(shards.read(i), pictures.read(i))
        assert torch.equal(shards.read(i, draws=draws, index=i + 40), pictures.read(i, draws=draws, index=i + 40))
    assert json.loads(json.dumps(shards.fingerprint())) == shards.fingerprint()
    assert shards.fingerprint()["count"] == 13
    built = Component("untwine.data:DATASETS", "shards", {"root": str(root), "resolution": 8, "channels": 1}).build()
    assert built.read(0).shape == (1, 8, 8)


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 0), (4, 0), (1, 2), (2, 1)])
def test_the_order_is_that_of_the_folder_on_any_number_of_processes(folder, root, workers, world_size):
    expected = updates(ImageFolder(folder, 8), 5, batch_size=4)
    dataset = Shards(root, 8)
    parts = [
        updates(dataset, 5, batch_size=4, rank=rank, world_size=world_size, num_workers=workers)
        for rank in range(world_size)
    ]
    same_batches(expected, [cat(list(update)) for update in zip(*parts)])
    assert 4 < 5 * 4 % 13 < 13  # the last update lies in the second epoch
    same_batches(expected[2:], updates(dataset, 3, batch_size=4, num_workers=workers, start_update=2))


def test_the_index_is_made_once_and_again_for_what_changes(root, tmp_path, monkeypatch, caplog):
    looked = []
    scan = module._scan
    monkeypatch.setattr(module, "_scan", lambda path: looked.append(path.name) or scan(path))
    before = Shards(root, 8).fingerprint()
    assert sorted(looked) == [f"train-{i:03d}.tar" for i in range(4)]
    looked.clear()
    for path in root.glob("*.tar"):
        os.utime(path, (0, 0))
    assert (Shards(root, 8).fingerprint(), looked) == (before, [])
    shard(root / "train-001.tar", [("new.png", png(1)), ("new.cls", "ant")])
    shard(root / "train-004.tar", [("more.png", png(2)), ("more.cls", "dog")])
    (root / "train-000.tar").unlink()
    changed = Shards(root, 8)
    assert sorted(looked) == ["train-001.tar", "train-004.tar"]
    assert changed.names[:2] == ["train-001.tar/new.png", "train-002.tar/bee/2.png"]
    assert changed.class_names == ("ant", "bee", "cow", "dog")
    assert changed.fingerprint() != before
    assert [path.name for path in root.iterdir() if not path.name.endswith(".tar")] == [INDEX]
    (root / INDEX).write_text('{"format": "unt')
    assert Shards(root, 8).fingerprint() == changed.fingerprint()
    assert f"{INDEX} is damaged and made anew" in caplog.text
    Shards(root, 8, index=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / INDEX).read_bytes() == (root / INDEX).read_bytes()


def test_an_index_that_cannot_be_kept_is_said(root, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(Shards(root, 8, index=tmp_path / "file")) == 13
    assert "the index is not kept" in caplog.text
    assert "give data.index a folder that can be written" in caplog.text


def test_a_picture_that_has_moved_is_noticed_when_it_is_read(root):
    dataset = Shards(root, 8)
    dataset.read(0)
    path = root / "train-000.tar"
    content = path.read_bytes()
    path.write_bytes(content[1024:])
    with pytest.raises(CorruptImage, match=r"train-000\.tar/ant/0\.png.* if .*has changed, start again"):
        dataset.read(0)
    path.write_bytes(content[:600])
    with pytest.raises(CorruptImage, match=r"train-000\.tar/ant/0\.png is not what .*untwine-index\.json says"):
        dataset.read(0)
    with pytest.raises(CorruptImage, match=r"train-000\.tar/ant/3\.png"):
        dataset.read(3)
    assert dataset.read(4).shape == (3, 8, 8)
    path.write_bytes(content)
    assert torch.equal(dataset.read(0), Shards(root, 8).read(0))


def test_threads_and_copies_read_the_same(root):
    dataset = Shards(root, 8)
    expected = [dataset.read(i) for i in range(13)]
    found = {}

    def read(source, start):
        for k in range(200):
            found[start, k] = torch.equal(source.read((start + k) % 13), expected[(start + k) % 13])

    copies = [dataset, pickle.loads(pickle.dumps(dataset))]
    threads = [threading.Thread(target=read, args=(copies[i % 2], i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1200
    assert all(found.values())


def test_captions_and_labels_of_every_form(tmp_path):
    told = {"caption": "a dog", "label": 2, "url": "x"}
    shard(
        tmp_path / "deep" / "a.tar",
        [
            ("./x/0.PNG", png(0)),
            ("./x/0.json", json.dumps(told)),
            ("./x/1.seg.png", b"a mask"),
            ("./x/1.txt", "\ufeffdeux étés\n"),
            ("./x/1.cls", "0"),
            ("./x/1.webp", png(1)),
        ],
    )
    shard(tmp_path / "b.tar", [("x/0.jpg", png(2)), ("x/0.txt", "again"), ("x/0.cls", "1\n"), ("note.md", "hello")])
    dataset = Shards(tmp_path, 8)
    assert dataset.names == ["b.tar/x/0.jpg", "deep/a.tar/x/0.PNG", "deep/a.tar/x/1.webp"]
    assert dataset.captions == ["again", "a dog", "deux étés"]
    assert (dataset.labels.tolist(), dataset.class_names) == ([1, 2, 0], ("0", "1", "2"))
    only = {layout: Shards(tmp_path, 8, layout=layout) for layout in ("flat", "classes", "captions")}
    assert [(d.num_classes, d.captions is None) for d in only.values()] == [(0, True), (3, True), (0, False)]
    assert dataset.split(1, seed=0)[1].captions[0] in dataset.captions


def test_samples_that_lack_a_part(tmp_path, caplog):
    shard(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", "1"), ("1.cls", "1"), ("2.png", png(2))])
    with pytest.raises(ValueError, match=r"1 of 2 samples in .* have no label \(a\.tar/2\.png\); .*layout='flat'"):
        Shards(tmp_path, 8)
    assert "a.tar: 1 samples without a picture are left out: 1" in caplog.text
    assert Shards(tmp_path, 8, layout="flat").labels is None
    with pytest.raises(ValueError, match=r"layout 'captions': 2 of 2 samples .* have no caption"):
        Shards(tmp_path, 8, layout="captions")


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.png", png(0)), ("a.png", png(1))], r"sample a has two members of the kind picture, the second a\.png"),
        ([("a.png", png(0)), ("a.jpg", png(1))], r"sample a has two members of the kind picture, the second a\.jpg"),
        ([("a.png", png(0)), ("a.cls", "1"), ("b.png", b""), ("a.cls", "2")], "sample a has two members of .* cls"),
        ([("a.png", png(0)), ("a.json", "{")], r"member a\.json: Expecting"),
        ([("a.png", png(0)), ("a.txt", b"\xff\xfe\xfa")], r"member a\.txt: .*utf-8"),
        ([("a.png", png(0)), ("a.cls", "-1")], "must be names or numbers >= 0, got -1"),
        ([("a.cls", "1")], r"root has no pictures: 1 \*\.tar files"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, members, message):
    shard(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path, 8)
    assert list(tmp_path.glob(".untwine-index*")) == []


def test_every_truncation_is_named(tmp_path):
    whole = shard(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(3)]).read_bytes()
    end = 3 * (512 + 512 * -(-len(png(0)) // 512))  # of the members
    for size in (0, 1, 511, 512, 513, 600, *range(700, end, 177), end):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.tar is truncated or damaged after (its beginning|\d\.png): "):
            Shards(tmp_path, 8)
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])
    assert len(Shards(tmp_path, 8)) == 3
    (tmp_path / "a.tar").write_bytes(whole.replace(b"1.png", b"1.pmg"))  # fails the checksum of that header
    with pytest.raises(ValueError, match=r"a\.tar is truncated or damaged after 0\.png"):
        Shards(tmp_path, 8)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"root must be an existing folder, got .*gone"):
        Shards(tmp_path / "gone", 8)
    with pytest.raises(ValueError, match=r"root has no pictures: 0 \*\.tar files"):
        Shards(tmp_path, 8)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"compressed shards only, such as a\.tar\.gz: decompress them"):
        Shards(tmp_path, 8)
    for options, told in (({"max_corrupt": 2.0}, "max_corrupt must be within"), ({"resolution": 0}, "resolution must")):
        with pytest.raises(ValueError, match=told):
            Shards(tmp_path, **{"resolution": 8, **options})


def test_corrupt_pictures_are_replaced_counted_and_named(tmp_path, caplog):
    names = broken_files(tmp_path)[:5]
    bad = [(f"{i}-{name}", (tmp_path / name).read_bytes()) for i, name in enumerate(names)]
    shard(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(60)] + bad)
    dataset = Shards(tmp_path, 8, max_corrupt=0.1)
    assert all(len(update.x0) == 8 for update in updates(dataset, 20, batch_size=8, num_workers=1))
    for name, _ in bad:
        assert sum(f"a.tar/{name}: " in record.message for record in caplog.records) == 1
    with pytest.raises(CorruptImage, match=r"samples are corrupt, more than max_corrupt = 0\.01"):
        updates(Shards(tmp_path, 8), 20, batch_size=8)


def test_small_pictures_are_warned_of(tmp_path, caplog):
    shard(tmp_path / "a.tar", [(f"{i}.png", png(i, 3, 4)) for i in range(2)])
    dataset = Shards(tmp_path, 8)
    assert [dataset.read(i).shape for i in range(2)] == [(3, 8, 8)] * 2
    assert len(re.findall(r"smaller than 8 are upscaled, the first: .*a\.tar/0\.png", caplog.text)) == 1


def test_a_run_on_shards_is_a_run_on_the_folder_and_goes_on_in_mid_epoch(folder, root, tmp_path):
    def run(name, data, *stops):
        changes = {"data": {"resolution": 8, "flip": True, **data}, "train.batch_size": 4, "train.num_steps": 6}
        for stop in (*stops, None):
            trainer = Trainer(tiny(**changes, **{"train.validation": 3}), tmp_path / name, device="cpu")
            trainer.fit(until=stop)
        return trainer.networks.tensors()

    whole = run("folder", {"kind": "folder", "root": str(folder)})
    broken_off = run("shards", {"kind": "shards", "root": str(root)}, 1, 4)
    assert all(torch.equal(whole[name], broken_off[name]) for name in whole)
    shard(root / "train-002.tar", [("bee/9.png", png(9)), ("bee/9.cls", "bee")])
    with pytest.raises(ValueError, match="data"):
        run("shards", {"kind": "shards", "root": str(root)})
