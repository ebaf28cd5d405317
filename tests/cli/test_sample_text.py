"""``untwine train``, ``info`` and ``sample`` with a model of texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.behaviour.pictures import save
from tests.behaviour.text_encoders import bert
from tests.tiny import tiny

QUICK = ("--num-inference-steps", 2)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    """Of a tiny model of texts, as a user would write it."""
    root = tmp_path_factory.mktemp("texts")
    for k, name in enumerate(["red", "green", "blue"] * 4):
        save(root / "pictures" / f"{k:02d}.png", np.full((8, 8, 3), 20 * k, np.uint8))
        (root / "pictures" / f"{k:02d}.txt").write_text(f"a {name} square")
    model = {
        "kind": "ddt_head", "conditioning": "tokens", "hidden_size": 32, "decoder_hidden_size": 32, "depth": 2,
        "encoder_depth": 1, "num_heads": 2, "decoder_num_heads": 2, "patch_size": 4,
    }  # fmt: skip
    recipe = tiny(
        **{
            "data": {"kind": "folder", "root": str(root / "pictures"), "resolution": 8},
            "condition": {"kind": "text", "encoder": str(bert(root / "bert")), "max_tokens": 6},
            "model": model,
            "train.validation": 3,
            "train.batch_size": 4,
            "train.num_steps": 2,
        }
    )
    data = recipe.to_dict()
    for told_by_data in ("in_channels", "num_classes", "text_dim"):
        del data["model"][told_by_data]
    (root / "mine.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return root / "mine.yaml"


@pytest.fixture
def run(untwine, recipe_file):
    """A trained run."""
    folder = recipe_file.parent / "run"
    status, told, error = untwine("train", recipe_file, "--out", folder)
    assert status == 0, error
    assert "captions are read" not in told
    return folder


def test_dry_run_and_info_tell_of_the_texts(untwine, recipe_file, run):
    told = untwine("train", recipe_file, "--dry-run")[1]
    assert "captions    such as 'a " in told
    assert f"by {recipe_file.parent / 'bert'} in" in told
    told = untwine("info", run)[1]
    assert f"text      kind text, encoder {recipe_file.parent / 'bert'}, max_tokens 6" in told
    assert "condition text: " in untwine("info", "text")[1]


def test_prompts_come_in_turn_and_are_recorded(untwine, run, tmp_path):
    prompts = ["--prompt", "a red square", "--prompt", "blue", "--negative-prompt", "green"]
    status, _, error = untwine("sample", run, "--out", tmp_path, "--count", 3, *prompts, *QUICK)
    assert status == 0, error
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prompts"] == ["a red square", "blue", "a red square"]
    assert report["negative_prompt"] == "green"
    with Image.open(tmp_path / "000001.png") as picture:
        told = json.loads(picture.text["untwine"])
    assert told["prompt"] == "blue"
    assert "label" not in told
    assert np.load(tmp_path / "samples.npz").files == ["arr_0"]


def test_without_prompts_the_examples_of_the_checkpoint_are_drawn(untwine, run, tmp_path):
    assert untwine("sample", run, "--out", tmp_path, "--count", 4, *QUICK)[0] == 0
    found = json.loads((tmp_path / "report.json").read_text())["prompts"]
    assert sorted(set(found)) == ["a blue square", "a green square", "a red square"]
    assert found[3] == found[0]


def test_refusals(refused, run, run_folder, tmp_path):
    out = ("--out", tmp_path / "out")
    for arguments, message in (
        ((run, "--labels", 1), "labels: this DDTHead is conditioned on texts; give prompts instead"),
        ((run, "--prompt", "a big red cat square"), "prompt has 7 tokens, and this model was made for at most max_to"),
        ((run, "--text-encoder", "/gone"), "encoder: '/gone' is no folder here"),
        ((run_folder, "--prompt", "red"), "prompts: this DDT takes no text; give labels"),
        ((run_folder, "--text-encoder", "/gone"), "text_encoder: this DDT takes no text; leave it out"),
    ):
        assert message in refused("sample", *arguments, *out, *QUICK)
    assert not (tmp_path / "out" / "report.json").exists()
