"""``untwine sample``: the files it leaves, and what it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import untwine as library
from tests.tiny import tiny
from untwine.training.trainer import Trainer

QUICK = ("--num-inference-steps", 4)


@pytest.fixture
def damaged(run_folder, tmp_path):
    """A copy of the run with one checkpoint, whose weights file a function has changed."""

    def make(change) -> Path:
        copy = tmp_path / "damaged"
        shutil.copytree(run_folder, copy)
        newest, *others = sorted(copy.glob("checkpoints/step-*"), key=lambda p: -int(p.name.removeprefix("step-")))
        for other in others:
            shutil.rmtree(other)
        file = next(newest.glob("*.safetensors"))
        file.write_bytes(change(file.read_bytes()))
        return copy

    return make


def test_leaves_pictures_grid_arrays_and_report(untwine, run_folder, tmp_path):
    out = tmp_path / "samples"
    status, told, _ = untwine("sample", run_folder, "--out", out, "--count", 12, "--seed", 5, *QUICK)
    assert status == 0
    assert str(out / "grid.png") in told
    arrays = np.load(out / "samples.npz")
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_0"].shape == (12, 8, 8, 1)
    assert arrays["arr_1"].dtype == np.int64
    assert arrays["arr_1"].tolist() == [*range(10), 0, 1]
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"{k:06d}.png" for k in range(12)), "grid.png", "report.json", "samples.npz",
    ]  # fmt: skip
    with Image.open(out / "000011.png") as picture:
        told = json.loads(picture.text["untwine"])
        assert np.array_equal(np.asarray(picture), arrays["arr_0"][11, :, :, 0])
    assert (told["seed"], told["image"], told["label"]) == (5, 11, 1)
    assert told["sampling"]["num_inference_steps"] == 4
    assert told["origin"]["step"] == 8
    # What the metadata tells is enough to draw this image again.
    settings = {k: v for k, v in told["sampling"].items() if k != "solver"}
    again = library.load(run_folder)(
        [told["label"]], seed=told["seed"], first_image=told["image"], output_type="np",
        sampling=library.pipelines.image.Sampling(**settings),
    )  # fmt: skip
    assert np.abs(again.images[0] * 255 - arrays["arr_0"][11]).max() <= 1


def test_report_counts_what_was_computed(untwine, run_folder, tmp_path):
    """Guidance on (0.3, 0.9) of ten uniform steps, a state for two steps: counted by hand."""
    flags = ["--num-inference-steps", 10, "--guidance-scale", 2, "--guidance-interval", 0.3, 0.9, "--refresh-every", 2]
    untwine("sample", run_folder, "--out", tmp_path, "--count", 5, "--batch-size", 2, *flags)
    report = json.loads((tmp_path / "report.json").read_text())
    # t = 1.0 .9 .8 .7 .6 .5 .4 .3 .2 .1 : guided strictly inside, at .8 to .4, five of them.
    assert report["network_evaluations"] == 5 * (10 + 5)
    # States made at steps 0 2 4 6 8; the null branch is needed by steps 2 to 6, so by those of 2, 4 and 6.
    assert report["encoder_passes"] == 5 * (5 + 3)
    assert report["sampling"]["guidance_interval"] == [0.3, 0.9]
    assert report["seconds"] > 0
    assert (report["count"], report["seed"], report["dtype"], report["device"]) == (5, 0, "float32", "cpu")


def test_a_smaller_set_replaces_the_larger_one(untwine, run_folder, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"kept")
    untwine("sample", run_folder, "--out", tmp_path, "--count", 5, *QUICK)
    untwine("sample", run_folder, "--out", tmp_path, "--count", 2, *QUICK)
    assert len(list(tmp_path.glob("0*.png"))) == 2
    assert (tmp_path / "mine.png").read_bytes() == b"kept"
    untwine("sample", run_folder, "--out", tmp_path, "--count", 2, "--no-pictures", *QUICK)
    assert not list(tmp_path.glob("0*.png"))
    assert (tmp_path / "grid.png").is_file()


def test_labels_are_repeated_in_turn(untwine, run_folder, tmp_path):
    untwine("sample", run_folder, "--out", tmp_path, "--count", 5, "--labels", 9, 4, *QUICK)
    assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == [9, 4, 9, 4, 9]


def test_solvers_have_flags(untwine, run_folder, tmp_path):
    flags = ["--solver", "adams_bashforth", "--solver.order", 3]
    assert untwine("sample", run_folder, "--out", tmp_path, *flags, *QUICK)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sampling"]["solver"]["kind"] == "adams_bashforth"
    assert report["sampling"]["solver"]["order"] == 3


def test_checkpoint_may_follow_known_options(untwine, run_folder, tmp_path):
    assert untwine("sample", "--out", tmp_path, "--count", 3, run_folder, *QUICK)[0] == 0
    assert len(np.load(tmp_path / "samples.npz")["arr_0"]) == 3


def test_a_flag_value_is_not_taken_for_the_checkpoint(untwine, monkeypatch, tmp_path, run_folder):
    """Without a CHECKPOINT, ``--guidance-scale 3`` must not become ``CHECKPOINT = 3``."""
    asked = []
    load = library.load
    monkeypatch.setattr(
        "untwine.pipelines.loading.load", lambda name, **how: asked.append(name) or load(run_folder, **how)
    )
    assert untwine("sample", "--guidance-scale", 3, "--out", tmp_path, *QUICK)[0] == 0
    assert asked == ["ddt-digits"]
    assert json.loads((tmp_path / "report.json").read_text())["sampling"]["guidance_scale"] == 3


@pytest.mark.parametrize("weights", ["raw", "ema:1"])
def test_weights_of_a_run(untwine, run_folder, tmp_path, weights):
    """Each set of weights draws other images, and the images name it."""
    assert untwine("sample", run_folder, "--out", tmp_path / "a", *QUICK)[0] == 0
    assert untwine("sample", run_folder, "--out", tmp_path / "b", "--weights", weights, *QUICK)[0] == 0
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    assert not np.array_equal(a, b)
    assert json.loads((tmp_path / "b" / "report.json").read_text())["origin"]["weights"] == weights


REFUSED = {
    "no steps": (["--num-inference-steps", 0], ["num_inference_steps", "0"]),
    "negative steps": (["--num-inference-steps", -3], ["num_inference_steps", "-3"]),
    "interval reversed": (["--guidance-interval", 0.8, 0.3], ["guidance_interval must be increasing within [0, 1]"]),
    "guidance not a number": (["--guidance-scale", "nan"], ["guidance_scale", "nan"]),
    "negative guidance": (["--guidance-scale", -1], ["guidance_scale must be a finite number >= 0", "-1"]),
    "infinite guidance": (["--guidance-scale", "inf"], ["guidance_scale must be a finite number >= 0", "inf"]),
    "the null class": (["--labels", 10], ["labels must be within [0, 9], got [10]", "10 classes"]),
    "label far out": (["--count", 3, "--labels", 1, 2, 99], ["labels must be within [0, 9], got [99]"]),
    "negative label": (["--labels", -1], ["labels must be within [0, 9], got [-1]"]),
    "no images": (["--count", 0], ["count must be an integer >= 1, got 0"]),
    "no batch": (["--batch-size", 0], ["batch_size must be an integer >= 1, got 0"]),
    "negative seed": (["--seed", -1], ["seed must be an integer in [0, 2**64), got -1"]),
    "seed too large": (["--seed", 2**64], ["seed must be an integer in [0, 2**64)"]),
    "refresh of 0": (["--refresh-every", 0], ["refresh_every must be within [1, num_inference_steps", "got 0"]),
    "refresh too rare": (["--refresh-every", 51, "--num-inference-steps", 50], ["refresh_every must be within", "51"]),
    "unknown solver": (["--solver", "eulr"], ["unknown solver 'eulr'; did you mean 'euler'"]),
    "solver option": (["--solver", "adams_bashforth", "--solver.order", 9], ["order", "9"]),
    "misspelt flag": (["--guidance-scal", 2], ["--guidance-scal", "--guidance-scale"]),
    "patch": (["--size", 8, 7], ["size (8, 7) does not divide into patches; the nearest that does is (8, 8)"]),
    "unknown weights": (["--weights", "ema:2"], ["has no 'ema:2' (known: ema:0, ema:1, raw)"]),
    "stray word": (["--no-pictures", "--guidance-scale", 2, "stray"], ["stray"]),
}


@pytest.mark.parametrize("args, expected", REFUSED.values(), ids=REFUSED)
def test_refuses(refused, run_folder, tmp_path, args, expected):
    message = refused("sample", run_folder, "--out", tmp_path / "out", *args)
    assert all(part in message for part in expected), message
    assert not list(tmp_path.glob("out/*"))


def test_unwritable_out(refused, run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert "out: cannot write to" in refused("sample", run_folder, "--out", tmp_path / "file" / "out")


def test_unknown_checkpoint(refused, monkeypatch, tmp_path):
    (tmp_path / "ddt-digits").mkdir()
    (tmp_path / "ddt-digits" / "model_index.json").write_text("{}")
    monkeypatch.setattr("untwine.pipelines.loading.ASSETS", tmp_path)
    assert "unknown checkpoint 'ddt-digit'; did you mean 'ddt-digits'?" in refused("sample", "ddt-digit")
    assert "unknown checkpoint 'x'" in refused("sample", "x")


def test_a_path_that_is_not_there_asks_no_hub(refused, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "unknown checkpoint 'runs/mine'" in refused("sample", "runs/mine")


def test_hub_without_network(refused):
    message = refused("sample", "nobody/nothing")
    assert "'nobody/nothing' is no local folder, and the hub did not give it" in message


def test_a_pickle_is_not_opened(refused, tmp_path):
    bomb = tmp_path / "model.pt"
    with bomb.open("wb") as file:
        pickle.dump(_Bomb(tmp_path / "exploded"), file)
    message = refused("sample", bomb)
    assert "never loaded" in message
    assert f"untwine convert {bomb}" in message
    assert not (tmp_path / "exploded").exists()


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "boom")


def test_truncated_checkpoint(refused, damaged):
    message = refused("sample", damaged(lambda data: data[:-100]))
    assert "none of the 1 checkpoints" in message


def test_bit_flipped_checkpoint(refused, damaged):
    message = refused("sample", damaged(lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]))
    assert "none of the 1 checkpoints" in message


def test_a_damaged_checkpoint_is_passed_over(untwine, run_folder, tmp_path):
    """The one before it is sampled instead, and the report says which."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    newest = max(copy.glob("checkpoints/step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    next(newest.glob("*.safetensors")).write_bytes(b"gone")
    assert untwine("sample", copy, "--out", tmp_path / "out", *QUICK)[0] == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["origin"]["step"] == 6


def test_labels_for_an_unconditional_model(untwine, refused, tmp_path, recipe_file):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(8):
        Image.fromarray(np.full((8, 8), 30 * k, np.uint8)).save(pictures / f"{k}.png")
    data = {"kind": "folder", "root": str(pictures), "resolution": 8, "channels": 1}
    changes = {"data": data, "train.validation": 2, "train.batch_size": 4, "train.num_steps": 1}
    Trainer(tiny(**changes), tmp_path / "run").fit()
    message = refused("sample", tmp_path / "run", "--labels", 1, "--out", tmp_path / "out")
    assert "unconditional" in message
    assert "class_labels" in message
    assert untwine("sample", tmp_path / "run", "--out", tmp_path / "out", "--guidance-scale", 3, *QUICK)[0] == 0
    assert "arr_1" not in np.load(tmp_path / "out" / "samples.npz")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["network_evaluations"] == 16 * 4  # nothing to guide away from: one branch


def test_bfloat16(untwine, run_folder, tmp_path):
    untwine("sample", run_folder, "--out", tmp_path / "a", *QUICK)
    untwine("sample", run_folder, "--out", tmp_path / "b", "--dtype", "bfloat16", *QUICK)
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in "ab")
    assert 0 < np.abs(a - b).max() < 40
    assert torch.get_default_dtype() == torch.float32
