"""Emoji: the folder that npm's packages are turned into, and the data set over it."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.behaviour.emoji_packages import fake_npm
from tests.behaviour.test_data import test_every_registered_data_set_keeps_the_contract  # noqa: F401 - run here too
from untwine.data.emoji import CATEGORIES, METADATA, Emoji, prepare


@pytest.fixture
def npm(tmp_path, monkeypatch):
    fake_npm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return tmp_path / "bin"


@pytest.fixture
def root(npm, tmp_path):
    prepare(tmp_path / "emoji")
    return tmp_path / "emoji"


@pytest.fixture
def dataset(root):
    return Emoji(root)


def test_the_folder_and_what_it_tells(npm, tmp_path):
    assert prepare(tmp_path / "deep" / "emoji") == {"google": 4, "twitter": 3}
    root = tmp_path / "deep" / "emoji"
    assert [entry.name for entry in root.parent.iterdir()] == ["emoji"]
    assert sorted(file.name for file in (root / "twitter").iterdir()) == ["a.png", "b.png", "d.png"]
    told = json.loads((root / METADATA).read_text())
    assert told["styles"]["twitter"]["licence"] == "CC-BY-4.0"
    assert "Twemoji" in told["styles"]["twitter"]["attribution"]
    assert told["styles"]["google"]["source"] == "npm emoji-datasource-google 16.0.0"
    assert told["emoji"][2] == {
        "image": "c.png",
        "name": "egypt flag",
        "category": "Flags",
        "subcategory": "country-flag",
        "base": "c.png",
        "styles": ["google"],
    }


def test_samples_classes_and_captions(root):
    emoji = Emoji(root)
    assert emoji.num_classes == len(emoji.class_names) == 18
    assert emoji.class_names[1] == "google/Animals & Nature"
    assert emoji.names == [f"google/{x}.png" for x in "abcd"] + [f"twitter/{x}.png" for x in ("a", "b", "d")]
    assert emoji.captions == ["cat face", "dog", "egypt flag", "wave", "cat face", "dog", "wave"]
    told = [emoji.class_names[label] for label in emoji.labels]
    assert told[2:5] == ["google/Flags", "google/People & Body", "twitter/Animals & Nature"]
    image = Image.open(root / "twitter" / "b.png")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    expected = torch.from_numpy(np.asarray(white.convert("RGB")).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(emoji.read(5), expected)
    assert (emoji.read(5)[:, :8] == 1).all()
    assert Emoji(root, resolution=32).read(0).shape == (3, 32, 32)


def test_one_style(root):
    emoji = Emoji(root, styles=("twitter",))
    assert emoji.class_names == tuple(f"twitter/{name}" for name in CATEGORIES)
    assert emoji.labels.tolist() == [1, 1, 5]
    assert torch.equal(emoji.read(0), Emoji(root).read(4))
    assert Emoji(root, styles=("twitter", "google")).class_names[9] == "google/Activities"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_both_drawings_of_an_emoji_are_held_out_together(npm, tmp_path, count):
    prepare(tmp_path / "emoji", skin_tones=True)
    emoji = Emoji(tmp_path / "emoji")
    assert len(emoji) == 11
    for seed in range(5):
        train, held = emoji.split(count, seed)
        assert len(train) + len(held) == 11
        assert len(held) > 0
        bases = [{name.rpartition("/")[2][0] for name in part.names} for part in (train, held)]
        assert not bases[0] & bases[1]


def test_skin_tones_are_asked_for(npm, tmp_path):
    assert prepare(tmp_path / "with", skin_tones=True) == {"google": 6, "twitter": 5}
    emoji = Emoji(tmp_path / "with", styles=("google",))
    assert [name for name in emoji.names if "/d" in name] == ["google/d-1.png", "google/d-2.png", "google/d.png"]
    assert len(set(emoji.groups[3:])) == 1


def test_a_prepared_folder_is_left_as_it_is(root, npm):
    before = (root / METADATA).stat().st_mtime_ns
    (npm / "npm").write_text("#!/bin/sh\nexit 1\n")
    assert prepare(root) == {"google": 4, "twitter": 3}
    assert (root / METADATA).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was prepared with styles google, twitter and skin_tones=False; remove it"):
        prepare(root, ["google"])


def test_npm_that_is_absent_or_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is not installed: install it"):
        prepare(tmp_path / "emoji")
    fake_npm(tmp_path / "bin", failure="npm error network unreachable")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(RuntimeError, match=r"exit status 7\):\nnpm error network unreachable"):
        prepare(tmp_path / "out" / "emoji")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_folders_and_options(root, tmp_path):
    with pytest.raises(ValueError, match=r"holds no emoji.*untwine data emoji --out"):
        Emoji(tmp_path / "nowhere")
    for styles in ((), ("google", "google"), ("apple",)):
        with pytest.raises(ValueError, match="styles must be one or both of google, twitter"):
            Emoji(root, styles=styles)
    for styles in ((), ("apple",)):
        with pytest.raises(ValueError, match="styles must be one or both of google, twitter"):
            prepare(tmp_path / "x", styles)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(ValueError, match="mine holds no emoji"):
        prepare(tmp_path / "mine")
    prepare(tmp_path / "google", ["google"])
    with pytest.raises(ValueError, match="lacks twitter; it has google"):
        Emoji(tmp_path / "google")
    for text in ("{", "[]", '{"format": "other"}'):
        (root / METADATA).write_text(text)
        with pytest.raises(ValueError, match=r"emoji\.json is damaged"):
            Emoji(root)
