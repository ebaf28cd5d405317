"""``untwine train``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import os

import pytest
import yaml

from untwine.cli import main
from untwine.training.metering import read_log


@pytest.fixture
def changed(recipe_file, tmp_path):
    """The recipe file with one value replaced, by a text that is put into the YAML as it stands."""

    def write(path: str, text: str) -> str:
        data = yaml.safe_load(recipe_file.read_text())
        place = data
        for name in path.split(".")[:-1]:
            place = place[name]
        place[path.split(".")[-1]] = "PLACE"
        file = tmp_path / "changed.yaml"
        file.write_text(yaml.safe_dump(data, sort_keys=False).replace("PLACE", text))
        return str(file)

    return write


def test_trains_and_continues(untwine, recipe_file, tmp_path):
    out = tmp_path / "run"
    status, told, log = untwine("train", recipe_file, "--out", out)
    assert status == 0
    assert "step 2  loss" in log
    assert f"untwine sample {out}" in told
    status, told, log = untwine("train", recipe_file, "--out", out, "--train.num-steps", 3)
    assert status == 0
    assert f"resumed {out} at step 2" in log
    assert f"{out}: step 3" in told
    assert [line["step"] for line in read_log(out / "log.jsonl", "train")] == [1, 2, 3]


def test_print_config_is_a_recipe(untwine, recipe_file, tmp_path):
    status, out, _ = untwine("train", recipe_file, "--optimizer.lr", "3e-4", "--print-config")
    assert status == 0
    assert yaml.safe_load(out)["optimizer"]["lr"] == 3e-4
    copy = tmp_path / "copy.yaml"
    copy.write_text(out)
    assert untwine("train", copy, "--print-config")[1] == out


def test_dry_run_writes_nothing(untwine, recipe_file, tmp_path):
    status, out, _ = untwine("train", recipe_file, "--out", tmp_path / "run", "--dry-run")
    assert status == 0
    assert "68,356 parameters" in out
    assert "1737 training samples, 60 held out" in out
    assert not (tmp_path / "run").exists()


def test_recipe_may_follow_known_options(untwine, recipe_file):
    status, out, _ = untwine("train", "--print-config", recipe_file, "--seed", 9)
    assert status == 0
    assert yaml.safe_load(out)["seed"] == 9


def test_a_plain_exponent_is_a_number(untwine, changed):
    status, out, _ = untwine("train", changed("optimizer.lr", "3e-4"), "--print-config")
    assert status == 0
    assert yaml.safe_load(out)["optimizer"]["lr"] == 3e-4


IN_FILE = {
    "quoted number": ("optimizer.lr", '"3e-4"', ["optimizer.lr", "expected float, got '3e-4'", "without quotes"]),
    "wrong type": ("train.batch_size", "many", ["recipe.train.batch_size", "expected int, got 'many'"]),
    "no steps": ("train.num_steps", "0", ["num_steps must be >= 1, got 0"]),
    "negative steps": ("train.num_steps", "-5", ["num_steps must be >= 1, got -5"]),
    "unknown kind": ("model.kind", "ddtt", ["recipe.model.kind", "unknown model 'ddtt'", "did you mean 'ddt'"]),
    "head split": ("model.hidden_size", "30", ["hidden_size must be a multiple of 4 * num_heads = 8", "30"]),
    "encoder as deep as the model": ("model.encoder_depth", "3", ["encoder_depth must be within", "got 3"]),
    "reversed interval": ("sampling.guidance_interval", "[0.8, 0.3]", ["guidance_interval must be increasing", "0.8"]),
    "dropout of 1": ("objective.label_dropout", "1.0", ["label_dropout", "1.0"]),
    "other class count": ("model.num_classes", "3", ["recipe.model.num_classes is 3", "the data has 10"]),
}


@pytest.mark.parametrize("path, text, expected", IN_FILE.values(), ids=IN_FILE)
def test_refuses_a_value_in_the_file(refused, changed, tmp_path, path, text, expected):
    message = refused("train", changed(path, text), "--out", tmp_path / "run", "--dry-run")
    assert all(part in message for part in expected), message


ON_THE_COMMAND_LINE = {
    "misspelt recipe": (["ddt-digit"], ["unknown recipe 'ddt-digit'; did you mean 'ddt-digits'"]),
    "missing file": (["nowhere.yaml"], ["recipe file nowhere.yaml does not exist"]),
    "no recipe": ([], ["RECIPE is missing"]),
    "no recipe before options": (["--out", "x"], ["RECIPE is missing"]),
    "misspelt flag": (["ddt-digits", "--train.num-step", "5"], ["--train.num-step", "--train.num-steps"]),
    "word for a number": (["ddt-digits", "--train.num-steps", "five"], ["--train.num-steps", "'five'"]),
    "no steps": (["ddt-digits", "--train.num-steps", "0"], ["num_steps must be >= 1, got 0"]),
    "kind as a flag": (["ddt-digits", "--optimizer.kind", "muon"], ["--optimizer.kind", "--print-config"]),
    "unknown option": (["ddt-digits", "--dry"], ["--dry"]),
    "missing value": (["folder"], ["--data.root"]),
    "missing data": (["folder", "--data.root", "nowhere"], ["root must be an existing folder, got 'nowhere'"]),
}


@pytest.mark.parametrize("args, expected", ON_THE_COMMAND_LINE.values(), ids=ON_THE_COMMAND_LINE)
def test_refuses_a_command_line(refused, args, expected):
    message = refused("train", *args)
    assert all(part in message for part in expected), message


def test_misspelt_key_is_named_with_its_path(refused, recipe_file, tmp_path):
    file = tmp_path / "misspelt.yaml"
    file.write_text(recipe_file.read_text().replace("num_heads:", "num_head:"))
    message = refused("train", file)
    assert "recipe.model.num_head: unknown option; did you mean 'num_heads'?" in message


def test_unwritable_out(refused, recipe_file, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused("train", recipe_file, "--out", tmp_path / "file" / "run")
    assert "out: cannot write to" in message
    assert str(tmp_path / "file" / "run") in message


def test_second_run_in_a_folder(refused, recipe_file, run_folder):
    message = refused("train", recipe_file, "--out", run_folder, "--optimizer.lr", "0.5")
    assert "holds another run" in message
    assert "optimizer.lr: 0.001 -> 0.5" in message
    assert "another out folder" in message


def test_a_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "UNTWINE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", str(tmp_path / "nowhere.yaml")])
