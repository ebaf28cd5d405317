"""``untwine accelerate``: the files it leaves, what ``sample --plan`` makes of them, and what it refuses."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from untwine.acceleration.sharing.plan import SharingPlan

QUICK = ("--steps", 8, "--probe-images", 2, "--images", 2)


@pytest.fixture(scope="module")
def accelerated(run_folder, tmp_path_factory):
    from untwine.cli import main

    out = tmp_path_factory.mktemp("accelerate")
    arguments = ("accelerate", run_folder, "--budget", 3, *QUICK, "--guidance-scale", 2.0, "--out", out)
    assert main([str(argument) for argument in arguments]) == 0
    return out


def test_leaves_plan_report_and_pictures(accelerated):
    assert sorted(p.name for p in accelerated.iterdir()) == [
        "front.png", "plan.json", "report.json", "similarity.png",
    ]  # fmt: skip
    plan = SharingPlan.load(accelerated / "plan.json")
    assert len(plan.refresh) == 3 and plan.refresh[0] == 0
    settings = plan.sampling
    assert (settings.num_inference_steps, settings.forecast_order, settings.guidance_scale) == (8, 2, 2.0)
    report = json.loads((accelerated / "report.json").read_text())
    rows = report["runs"]
    assert report["plan"] == list(plan.refresh)
    assert rows["plan"]["refreshed"] == 3 and rows["exact"]["drift"] == 0
    assert {row["series"] for row in rows.values()} >= {"reuse, uniform", "reuse, similarity", "fewer solver steps"}
    assert 0 < rows["plan"]["flops_saved"] < 1
    for name in ("front.png", "similarity.png"):
        with Image.open(accelerated / name) as picture:
            assert min(picture.size) > 300


def test_plan_samples(untwine, run_folder, accelerated, tmp_path):
    plan = accelerated / "plan.json"
    status, told, _ = untwine("sample", run_folder, "--plan", plan, "--count", 3, "--out", tmp_path)
    assert status == 0 and "forecast_order 2" in told
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sampling"]["num_inference_steps"] == 8
    assert report["encoder_passes"] < report["network_evaluations"]


def test_plan_refuses_other_settings(refused, run_folder, accelerated, tmp_path):
    told = refused("sample", run_folder, "--plan", accelerated / "plan.json", "--shift", 2, "--out", tmp_path / "x")
    assert "made for shift = 1.0, and the sampler has shift = 2.0; set shift to 1.0" in told
    told = refused("sample", "ddt-digits", "--plan", accelerated / "plan.json", "--out", tmp_path / "x")
    assert "made for the weights" in told
    (tmp_path / "broken.json").write_text("{")
    assert "is no sharing plan" in refused("sample", run_folder, "--plan", tmp_path / "broken.json")


def test_without_the_front(untwine, run_folder, tmp_path):
    arguments = ("--no-front", "--cost", "similarity", "--order", 0, "--budget", 2)
    status, told, _ = untwine("accelerate", run_folder, *QUICK, *arguments, "--out", tmp_path)
    assert status == 0 and "(similarity)" in told
    assert not (tmp_path / "front.png").exists()
    assert set(json.loads((tmp_path / "report.json").read_text())["runs"]) == {"exact", "plan"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--budget", 0), "budget must be within [1, num_steps = 8] computed steps, got 0"),
        (("--budget", 9), "budget must be within [1, num_steps = 8] computed steps, got 9"),
        (("--order", 5), "order must be 0 (reuse), 1, 2 or 3, got 5"),
        (("--images", 0), "images must be at least 1, got 0"),
        (("--out", "/proc/nothing"), "cannot write to /proc/nothing"),
    ],
    ids=str,
)
def test_refuses(refused, run_folder, arguments, message):
    assert message in refused("accelerate", run_folder, *QUICK, "--budget", 3, *arguments)
