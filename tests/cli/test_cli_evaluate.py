"""``untwine evaluate``: what it prints and leaves, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from untwine.evaluation import selfcheck
from untwine.evaluation.protocols import DEFAULT, PROTOCOLS, Protocol
from untwine.evaluation.selfcheck import shapes

QUICK = Protocol(
    name="quick", encoder="pixels", num_samples=40, metrics=("fd", "kid", "precision_recall"), principal_axes=8
)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A protocol without a network, and an empty folder to work in."""
    monkeypatch.setitem(PROTOCOLS, "quick", QUICK)
    monkeypatch.chdir(tmp_path)


def test_samples_against_a_folder(untwine, tmp_path):
    np.savez("samples.npz", arr_0=shapes(40, radius=7))
    (tmp_path / "real").mkdir()
    for k, image in enumerate(shapes(90, radius=8, first=40)):
        Image.fromarray(image).save(tmp_path / "real" / f"{k:03d}.png")
    status, out, err = untwine(
        "evaluate", "samples.npz", "--reference", "real", "--protocol", "quick", "--out", "report"
    )
    assert status == 0, err
    told = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert "40 samples against 90 pictures of real, protocol quick" in out
    assert f"FD-pixels            {told['metrics']['fd']:.4g} (floor {told['floor']['fd']:.4g}" in out
    assert "real against real, 40 against 50) on 8 principal axes" in out
    assert "held-out picture's distance" in out
    assert "report: report/evaluation.json" in out
    assert (tmp_path / "report" / "nearest.png").is_file()
    assert list((tmp_path / "out" / "references").iterdir())


def test_a_checkpoint_is_drawn_and_compared_with_the_data_of_a_recipe(untwine, run_folder, recipe_file, tmp_path):
    flags = ["--protocol", "quick", "--num-inference-steps", 3, "--seed", 4, "--weights", "raw"]
    status, out, err = untwine("evaluate", run_folder, "--reference", recipe_file, *flags, "--num-samples", 30)
    assert status == 0, err
    assert "30 samples against 1797 pictures" in out
    assert "protocol quick (modified: num_samples" in out
    told = json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())
    assert told["samples"]["seed"] == 4
    assert told["samples"]["sampling"]["num_inference_steps"] == 3
    assert told["samples"]["origin"]["weights"] == "raw"
    drawn = np.load(tmp_path / "out" / "evaluation" / "samples" / "samples.npz")["arr_0"]
    assert drawn.shape == (30, 8, 8, 1)
    untwine("evaluate", "out/evaluation/samples", "--reference", "digits", "--protocol", "quick", "--num-samples", 30)
    again = json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())
    assert again["metrics"] == told["metrics"]


def test_self_check_tells_by_its_status(untwine, monkeypatch, tmp_path):
    (tmp_path / "good.json").write_text(json.dumps({"pixels": {"recall": 0.75}}))
    (tmp_path / "bad.json").write_text(json.dumps({"pixels": {"recall": 0.76}}))
    monkeypatch.setattr(selfcheck, "SHIPPED", tmp_path / "good.json")
    status, out, _ = untwine("evaluate", "--self-check")
    assert status == 0
    assert out.count("ok:") == 3
    monkeypatch.setattr(selfcheck, "SHIPPED", tmp_path / "bad.json")
    status, out, _ = untwine("evaluate", "--self-check")
    assert status == 1
    assert "FAILED: 0.75, expected 0.76" in out


def test_the_help_names_every_protocol(untwine):
    status, out, _ = untwine("evaluate", "--help")
    assert status == 0
    told = " ".join(out.replace("│", " ").split())
    assert all(name in told for name in PROTOCOLS if name != "quick")
    assert f"(default: {DEFAULT})" in told


REFUSED = {
    "nothing": ([], "SAMPLES is missing"),
    "no reference": (["samples.npz"], "reference is missing"),
    "missing npz": (["none.npz", "--reference", "digits"], "none.npz cannot be read"),
    "missing folder": (["nothing", "--reference", "digits"], "no folder of pictures and no .npz file; and as a check"),
    "empty folder": (["empty", "--reference", "digits"], "root has no images: 'empty'"),
    "unknown protocol": (
        ["samples.npz", "--reference", "digits", "--protocol", "quicks"],
        "unknown 'quicks'; did you mean 'quick'",
    ),
    "unknown reference": (["samples.npz", "--reference", "digitz"], "did you mean 'digits'"),
    "unknown flag": (["samples.npz", "--reference", "digits", "--shift", "2"], "unknown option --shift"),
    "too few": (["samples.npz", "--reference", "digits", "--num-samples", "41"], "holds 40 pictures"),
    "other size": (["samples.npz", "--reference", "digits"], "8 x 8 pixels, the samples 32 x 32"),
    "one sample": (["samples.npz", "--reference", "digits", "--num-samples", "1"], "num_samples and max_reference"),
    "weights of none": (
        ["samples.npz", "--reference", "digits", "--encoder-weights", "x"],
        "encoder pixels takes none, got x",
    ),
}


@pytest.mark.parametrize("args,message", REFUSED.values(), ids=REFUSED)
def test_refused(refused, tmp_path, args, message):
    np.savez("samples.npz", arr_0=shapes(40, radius=7))
    (tmp_path / "empty").mkdir()
    protocol = [] if "--protocol" in args else ["--protocol", "quick"]
    assert message in refused("evaluate", *args, *protocol)
    assert not (tmp_path / "out" / "evaluation" / "evaluation.json").exists()


def test_inception_and_dinov2_say_what_they_need(refused, monkeypatch, tmp_path):
    np.savez("samples.npz", arr_0=shapes(40, radius=7))
    monkeypatch.setenv("UNTWINE_INCEPTION", str(tmp_path / "none.pth"))
    told = refused("evaluate", "samples.npz", "--reference", "digits", "--protocol", "adm-50k")
    assert "weights-inception-2015-12-05-6726825d.pth" in told
    told = refused("evaluate", "samples.npz", "--reference", "digits", "--protocol", "fd-dinov2-50k")
    assert "encoder_weights is missing: name the folder of a dinov2 checkpoint" in told


def test_a_checkpoint_of_another_size_draws_nothing(refused, run_folder, tmp_path):
    np.savez("real.npz", arr_0=shapes(40, radius=7))
    told = refused("evaluate", run_folder, "--reference", "real.npz", "--protocol", "quick")
    assert "32 x 32 pixels, the samples 8 x 8" in told
    assert not (tmp_path / "out" / "evaluation" / "samples").exists()
