"""``untwine bench``: sweeps and pictures."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.tiny import tiny
from untwine.cli import main
from untwine.training.trainer import Trainer


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    told = ["--values", "2", "8", "--num-samples", "40", "--protocol", "kid-efflite0-500"]
    command = [
        "bench",
        "quality",
        "ddt-digits",
        "--reference",
        "digits",
        *told,
        "--out",
        str(out / "a"),
        "--cache",
        str(out / "cache"),
    ]
    assert main(command) == 0
    return out / "a"


def test_quality_improves_with_steps(sweep):
    found = json.loads((sweep / "quality.json").read_text())
    few, many = found["rows"]
    assert (few["value"], many["value"]) == (2, 8)
    assert many["kid"] < 0.8 * few["kid"]
    assert many["evaluations_per_image"] > 3 * few["evaluations_per_image"]
    assert found["protocol"]["num_samples"] == 40
    assert Image.open(sweep / "quality.png").size == (1400, 588)


def test_several_results_make_one_picture(sweep, tmp_path):
    file = str(sweep / "quality.json")
    assert main(["bench", "plot", file, file, "--out", str(tmp_path / "both.png")]) == 0
    assert Image.open(tmp_path / "both.png").width == 1400


def test_losses_of_runs(tmp_path, capsys):
    Trainer(tiny(**{"train.num_steps": 4, "train.validate_every": 2}), tmp_path / "run").fit()
    assert main(["bench", "loss", str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert "at step 4" in capsys.readouterr().out
    assert [line["step"] for line in json.loads((tmp_path / "loss.json").read_text())["run"]] == [2, 4]
    assert (tmp_path / "loss.png").is_file()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench", "qualty"], "did you mean 'quality'"),
        (["bench", "quality", "ddt-digits", "--reference", "digits", "--over", "step"], "setting must be one of"),
        (["bench", "quality", "ddt-digits", "--reference", "digits", "--values", "0"], "num_inference_steps must be"),
        (["bench", "quality", "ddt-digits", "--reference", "digits", "--protocol", "fid"], "unknown 'fid'"),
        (["bench", "loss", "missing"], "missing holds no log.jsonl"),
        (["bench", "plot", "missing.json"], "missing.json is no result"),
    ],
)
def test_bad_input(command, message, capsys):
    assert main(command) == 2
    assert message in capsys.readouterr().err
