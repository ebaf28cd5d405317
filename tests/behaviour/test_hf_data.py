"""Hugging Face data sets on disk, in the three forms they have."""

import builtins
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.behaviour.pictures import picture, save
from tests.behaviour.test_data import test_every_registered_data_set_keeps_the_contract  # noqa: F401 - run here too
from untwine.codecs.identity import IdentityCodec
from untwine.config import Component
from untwine.data.base import CorruptImage
from untwine.data.huggingface import HuggingFace
from untwine.data.images import center_crop, to_tensor
from untwine.data.loading import Loader
from untwine.diffusion.draws import Draws

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def table(count=7, image="image", **columns):
    images = [Image.fromarray(picture(i)) for i in range(count)]
    features = {image: datasets.Image()}
    data = {image: images}
    for name, (values, feature) in columns.items():
        data[name], features[name] = values, feature
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def labelled(count=7):
    kinds = datasets.ClassLabel(names=["cat", "dog", "eel"])
    captions = [f"number {i}" for i in range(count)]
    return table(count, label=([i % 2 for i in range(count)], kinds), caption=(captions, datasets.Value("string")))


@pytest.fixture
def root(tmp_path):
    labelled().save_to_disk(tmp_path / "disk")
    return tmp_path / "disk"


@pytest.fixture
def dataset(root):
    return Component("untwine.data:DATASETS", "hf", {"root": str(root), "resolution": 8}).build()


def expected(i):
    return to_tensor(center_crop(Image.fromarray(picture(i)), 8))


def check_labelled(data):
    assert (len(data), data.num_classes, data.class_names) == (7, 3, ("cat", "dog", "eel"))
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert data.captions[3] == "number 3"
    for i in range(7):
        assert torch.equal(data.read(i), expected(i))


def test_saved_to_disk(root):
    check_labelled(HuggingFace(root, 8))


def test_parts_of_a_dictionary(tmp_path):
    datasets.DatasetDict({"train": labelled(), "test": labelled(2)}).save_to_disk(tmp_path / "disk")
    check_labelled(HuggingFace(tmp_path / "disk", 8))
    assert len(HuggingFace(tmp_path / "disk", 8, part="test")) == 2
    with pytest.raises(ValueError, match=r"part: .* has no 'valid'; it has train, test"):
        HuggingFace(tmp_path / "disk", 8, part="valid")


def test_parquet(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    whole = labelled()
    whole.select(range(4)).to_parquet(folder / "train-00000-of-00002.parquet")
    whole.select(range(4, 7)).to_parquet(folder / "train-00001-of-00002.parquet")
    whole.select(range(3)).to_parquet(folder / "test-00000-of-00001.parquet")
    check_labelled(HuggingFace(tmp_path / "set", 8))
    assert len(HuggingFace(tmp_path / "set", 8, part="test")) == 3
    with pytest.raises(ValueError, match="has no 'dev'"):
        HuggingFace(tmp_path / "set", 8, part="dev")
    whole.to_parquet(tmp_path / "one.parquet")
    check_labelled(HuggingFace(tmp_path / "one.parquet", 8))


def test_image_folder(tmp_path):
    for name in ("ant", "bee"):
        for i in range(3):
            save(tmp_path / "images" / name / f"{i}.png", picture(i))
    data = HuggingFace(tmp_path / "images", 8)
    assert (data.class_names, sorted(data.labels.tolist())) == (("ant", "bee"), [0, 0, 0, 1, 1, 1])
    assert torch.equal(data.read(int(np.flatnonzero(data.labels == 1)[0])), expected(0))
    before = data.fingerprint()
    (tmp_path / "images" / "ant" / "2.png").unlink()
    gone = int(np.flatnonzero(data.labels == 0)[2])
    with pytest.raises(CorruptImage, match=rf"row {gone} of .*No such file"):
        data.read(gone)
    assert data.fingerprint() != before


def test_modes_follow_the_rule_of_all_images(tmp_path):
    rgba = picture(0, channels=4)
    rgba[..., 3] = 0
    one = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(rgba)]}, features=datasets.Features({"image": datasets.Image()})
    )
    one.save_to_disk(tmp_path / "disk")
    assert (HuggingFace(tmp_path / "disk", 8).read(0) == 1).all()
    assert HuggingFace(tmp_path / "disk", 8, channels=1).read(0).shape == (1, 8, 8)


def test_labels_of_other_types(tmp_path):
    def kinds(name, values, feature, **options):
        table(4, **{name: (values, datasets.Value(feature))}).save_to_disk(tmp_path / name)
        return HuggingFace(tmp_path / name, 8, **options)

    texts = kinds("species", ["bee", "ant", "bee", "cow"], "string", label="species")
    assert (texts.class_names, texts.labels.tolist()) == (("ant", "bee", "cow"), [1, 0, 1, 2])
    numbers = kinds("labels", [0, 2, 2, 0], "int64")
    assert (numbers.class_names, numbers.labels.tolist()) == (("0", "1", "2"), [0, 2, 2, 0])
    assert kinds("prompt", list("abcd"), "string").captions == list("abcd")
    for values, feature in (([0, -1, 2, 0], "int64"), ([0.5] * 4, "float32"), ([0, None, 1, 1], "int64")):
        with pytest.raises(ValueError, match=r"label: column 'class' of .* must hold a class for every row"):
            kinds("class", values, feature)


def test_columns_are_found_or_named(tmp_path):
    two = table(2, image="photo", other=([Image.fromarray(picture(9))] * 2, datasets.Image()))
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"image: 2 columns could be it in .*; its columns are photo, other"):
        HuggingFace(tmp_path / "two", 8)
    data = HuggingFace(tmp_path / "two", 8, image="other")
    assert torch.equal(data.read(1), expected(9))
    assert (data.labels, data.captions, data.num_classes) == (None, None, 0)
    for option in ("image", "label", "caption"):
        with pytest.raises(ValueError, match=f"{option}: there is no column 'nope' in .*photo, other"):
            HuggingFace(tmp_path / "two", 8, **{"image": "other", option: "nope"})


def test_augmentation_follows_the_counter(root):
    data, draws = HuggingFace(root, 8, flip=True, crop="random"), Draws(0)
    assert torch.equal(data.read(1), expected(1))
    drawn = [data.read(1, draws=draws, index=i) for i in range(20)]
    assert torch.equal(drawn[5], data.read(1, draws=draws, index=5))
    assert len({x.numpy().tobytes() for x in drawn}) > 5


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_replaced_and_named(tmp_path, workers):
    rows = [{"bytes": b"broken", "path": None}, None]
    good = [{"bytes": save(tmp_path / "x.png", picture(i)).read_bytes(), "path": None} for i in range(5)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows + good}, features=features).save_to_disk(tmp_path / "disk")
    data = HuggingFace(tmp_path / "disk", 8, max_corrupt=0.5)
    for row in range(2):
        with pytest.raises(CorruptImage, match=f"row {row} of .*disk"):
            data.read(row)
    loader = Loader(data, IdentityCodec(), seed=0, batch_size=7, num_workers=workers)
    stream = iter(loader)
    next(stream)
    stream.close()
    assert sorted(loader.corrupt) == [0, 1]


def test_fingerprints_tell_content(root, tmp_path):
    before = HuggingFace(root, 8).fingerprint()
    labelled().save_to_disk(tmp_path / "again")
    assert HuggingFace(tmp_path / "again", 16).fingerprint() == before
    labelled(6).save_to_disk(tmp_path / "fewer")
    other = labelled().remove_columns("label")
    other.save_to_disk(tmp_path / "unlabelled")
    told = [HuggingFace(tmp_path / name, 8).fingerprint() for name in ("fewer", "unlabelled")]
    assert len({json.dumps(f) for f in (before, *told)}) == 3


def test_bad_roots(tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="root must be a folder of save_to_disk, images or parquet files, got"):
            HuggingFace(root, 8)
    table(0).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"root: .*none\.parquet cannot be read by datasets: .*no data"):
        HuggingFace(tmp_path / "none.parquet", 8)
    with pytest.raises(ValueError, match=r"max_corrupt must be within \[0, 1\], got 2"):
        HuggingFace(tmp_path / "none.parquet", 8, max_corrupt=2.0)
    with pytest.raises(ValueError, match="resolution must be at least 1, got 0"):
        HuggingFace(tmp_path / "none.parquet", 0)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(ValueError, match=r"root: .*bad\.parquet cannot be read by datasets"):
        HuggingFace(tmp_path / "bad.parquet", 8)


def test_the_missing_package_is_named(root, monkeypatch):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install untwine\[data\]"):
        HuggingFace(root, 8)
