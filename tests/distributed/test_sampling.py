"""A series of images drawn by several processes, and again after an interruption: the same files as by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.distributed.spawn import run_ranks
from untwine.encoders.pixels import Pixels
from untwine.evaluation.protocols import Protocol
from untwine.evaluation.report import evaluate
from untwine.pipelines.loading import load
from untwine.pipelines.series import Series, sample
from untwine.pipelines.writing import draw_into
from untwine.training.distributed import Distributed
from untwine.training.locking import FolderInUse, lock

pytestmark = pytest.mark.xdist_group("distributed")
REQUEST = {"count": 18, "batch_size": 4, "num_inference_steps": 2, "seed": 3}


def series(**changes) -> Series:
    return Series(load("ddt-digits"), **{**REQUEST, **changes})


def draw(processes: Distributed, folder: Path, stop_after: int | None = None) -> dict:
    """Draws a series; ``stop_after`` this many batches of its own, the first process fails."""
    made = []

    def on_batch(done: int) -> None:
        made.append(done)
        if len(made) == stop_after:
            raise KeyboardInterrupt

    try:
        return draw_into(folder, series(), on_batch=on_batch)
    except KeyboardInterrupt:
        return {"interrupted": True}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "report.json"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    draw_into(folder, series())
    return folder


def judge(processes: Distributed | None, samples: Path, out: Path) -> dict:
    protocol = Protocol(name="small", encoder="pixels", num_samples=18, metrics=("fd", "kid"), principal_axes=8)
    return evaluate(samples / "samples.npz", "digits", protocol, encoder=Pixels(), out=out, batch_size=4).values


def test_processes_share_an_evaluation(alone, tmp_path):
    one = judge(None, alone, tmp_path / "one")
    two = run_ranks(judge, 2, alone, tmp_path / "two")
    assert two[0]["metrics"] == two[1]["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["metrics"] == two[0]["metrics"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_make_the_files_of_one(alone, tmp_path, world_size):
    reports = run_ranks(draw, world_size, tmp_path)
    assert all(report == reports[0] for report in reports)
    assert reports[0]["processes"] == world_size
    arrays = [np.load(folder / "samples.npz") for folder in (alone, tmp_path)]
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in ("arr_0", "arr_1"))
    pictures = [{n: b for n, b in contents(f).items() if n.endswith(".png")} for f in (alone, tmp_path)]
    assert len(pictures[0]) == 19
    assert pictures[0] == pictures[1]


def test_the_files_are_those_of_a_set_in_memory(alone):
    samples, stored = sample("ddt-digits", **REQUEST), np.load(alone / "samples.npz")
    assert np.array_equal(samples.images, stored["arr_0"])
    assert np.array_equal(samples.labels, stored["arr_1"])
    told = json.loads((alone / "report.json").read_text())
    times = ("seconds", "processes")
    assert {k: v for k, v in told.items() if k not in times} == {
        k: v for k, v in samples.report.items() if k != times[0]
    }
    info = json.loads(Image.open(alone / "000017.png").info["untwine"])
    assert (info["image"], info["label"], info["seed"]) == (17, 7, 3)
    assert not (alone / "parts").exists()


def test_goes_on_after_an_interruption(alone, tmp_path):
    assert draw(Distributed.start("cpu"), tmp_path, stop_after=2) == {"interrupted": True}
    finished = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert finished == ["000000.safetensors", "000001.safetensors"]
    (tmp_path / "parts" / finished[1]).write_bytes(b"torn")
    drawn = []
    report = draw_into(tmp_path, series(), on_batch=drawn.append)
    assert (report["drawn_earlier"], drawn) == (4, [8, 12, 16, 18])
    assert contents(tmp_path).keys() == contents(alone).keys()
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], np.load(alone / "samples.npz")["arr_0"])


def test_another_request_starts_anew(tmp_path, caplog):
    draw(Distributed.start("cpu"), tmp_path, stop_after=1)
    report = draw_into(tmp_path, series(seed=4))
    assert "is of another request" in caplog.text
    assert "drawn_earlier" not in report
    assert np.array_equal(
        np.load(tmp_path / "samples.npz")["arr_0"], sample("ddt-digits", **REQUEST | {"seed": 4}).images
    )


def test_one_run_a_folder(tmp_path):
    with lock(tmp_path), pytest.raises(FolderInUse, match=str(tmp_path)):
        draw_into(tmp_path, series())
