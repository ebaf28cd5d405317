"""``untwine data``: emoji, and a latent cache that the next command trains on."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from tests.behaviour.emoji_packages import fake_npm
from tests.behaviour.pictures import folder_of
from tests.tiny import tiny
from tests.vaes import save_vae


@pytest.fixture
def recipe(tmp_path):
    for name in ("ant", "bee"):
        folder_of(tmp_path / "pictures" / name, 6)
    data = tiny(
        data={"kind": "folder", "root": str(tmp_path / "pictures"), "resolution": 8, "flip": True},
        codec={"kind": "vae", "path": str(save_vae(tmp_path / "vae")), "mean": [0.0], "std": [1.0]},
        **{"train.validation": 4, "train.batch_size": 4, "train.num_steps": 2, "train.log_every": 1},
    ).to_dict()
    for told_by_data in ("in_channels", "num_classes"):
        del data["model"][told_by_data]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return tmp_path / "mine.yaml"


def test_encode_train_sample(untwine, recipe, tmp_path):
    cache = tmp_path / "cache"
    status, out, err = untwine("data", "encode", recipe, "--out", cache, "--shard-size", 5)
    assert status == 0, err
    assert "samples  12 of (3, 8, 8), both sides" in out
    assert "latents  (4, 4, 4), mean and deviation, float32" in out
    assert "MiB" in out
    assert "measured on one batch" in out
    assert f"{cache}: 12 samples" in out
    assert f"train on it: untwine train {cache / 'recipe.yaml'}" in out
    status, out, err = untwine("train", cache / "recipe.yaml", "--out", tmp_path / "run")
    assert status == 0, err
    assert "step 2" in out
    status, out, err = untwine("sample", tmp_path / "run", "--count", 2, "--out", tmp_path / "samples")
    assert status == 0, err
    assert json.loads((tmp_path / "samples" / "report.json").read_text())["space"] == "pixels"
    assert (tmp_path / "samples" / "grid.png").is_file()


def test_the_same_command_again_has_nothing_to_do(untwine, recipe, tmp_path):
    args = ("data", "encode", recipe, "--out", tmp_path / "cache")
    assert untwine(*args)[0] == 0
    shard = tmp_path / "cache" / "latents-00000-of-00001.safetensors"
    before = shard.stat().st_mtime_ns
    assert untwine(*args)[0] == 0
    assert shard.stat().st_mtime_ns == before


def test_a_dry_run_writes_nothing(untwine, recipe, tmp_path):
    status, out, _ = untwine("data", "encode", recipe, "--out", tmp_path / "cache", "--dry-run")
    assert status == 0
    assert "dry run: nothing is written" in out
    assert not (tmp_path / "cache").exists()


def test_flags_change_the_recipe(untwine, recipe, tmp_path):
    status, out, err = untwine("data", "encode", recipe, "--dry-run", "--data.resolution", 16, "--dtype", "bfloat16")
    assert status == 0, err
    assert "(4, 8, 8), mean and deviation, bfloat16" in out


def test_another_cache_or_codec_is_refused(refused, untwine, recipe, tmp_path):
    cache = tmp_path / "cache"
    assert untwine("data", "encode", recipe, "--out", cache)[0] == 0
    message = refused("data", "encode", recipe, "--out", cache, "--data.resolution", 16)
    assert "holds a cache of other data or settings: sample_shape: [3, 8, 8] -> [3, 16, 16]" in message
    other = save_vae(tmp_path / "other", seed=1)
    message = refused("train", cache / "recipe.yaml", "--codec.path", other, "--out", tmp_path / "run")
    assert "was encoded by another codec than recipe.codec" in message
    assert "weights: " in message
    next(cache.glob("*.safetensors")).unlink()
    message = refused("train", cache / "recipe.yaml", "--out", tmp_path / "run")
    assert "latents-00000-of-00001.safetensors is missing" in message


def test_emoji(untwine, refused, tmp_path, monkeypatch):
    fake_npm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    status, out, err = untwine("data", "emoji", "--out", tmp_path / "emoji")
    assert status == 0, err
    assert f"{tmp_path / 'emoji'}: 4 pictures of google, 3 pictures of twitter" in out
    assert "attribution" in out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm is not installed" in refused("data", "emoji", "--out", tmp_path / "again")


def test_actions_are_listed_and_misspelt_ones_refused(untwine, refused):
    for args in ((), ("--help",)):
        status, out, _ = untwine("data", *args)
        assert status == 0
        assert "encode" in out
        assert "emoji" in out
    assert "unknown action 'emojis'; did you mean 'emoji'?" in refused("data", "emojis")
    assert "RECIPE is missing; write untwine data encode RECIPE" in refused("data", "encode")


@pytest.mark.parametrize("action", ["encode", "emoji"])
def test_help_of_an_action(untwine, action):
    status, out, _ = untwine("data", action, "--help")
    assert status == 0
    assert out.startswith(f"usage: untwine data {action}")
    assert "--out FOLDER" in out
