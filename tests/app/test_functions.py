"""What the tabs show, asked for directly."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import untwine
from tests.app.conftest import make_studio
from untwine.acceleration.sharing.plan import SharingPlan
from untwine.app import measure, runs, share
from untwine.app.charts import heat_map, line_chart
from untwine.app.create import create
from untwine.app.jobs import Job, Jobs, Stopped, explain
from untwine.app.limits import Limits, Refused
from untwine.app.markup import facts, film, note, table
from untwine.app.requests import Request
from untwine.app.tab_runs import show, show_sheets
from untwine.app.tab_share import show_sides
from untwine.app.tab_watch import speed_chart
from untwine.app.watch import watch
from untwine.evaluation.protocols import PROTOCOLS, Protocol

pytestmark = pytest.mark.xdist_group("studio")  # one server and two short runs for all of it
DIGITS = "ddt-digits"


def test_created_pictures_are_those_of_the_pipeline_and_carry_their_settings(studio):
    request = Request.read(studio, DIGITS, count=3, steps=4, seed=7, guidance=2.0)
    made = create(studio, request, Job(""))
    pipe = untwine.load(DIGITS)
    settings = replace(pipe.sampling, num_inference_steps=4, guidance_scale=2.0)
    expected = pipe(num_images=3, seed=7, sampling=settings).images
    for (path, caption), picture, k in zip(made.pictures, expected, range(3)):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
        assert caption == f"{k} · #{k}"
    about = made.about(2)
    assert (about["seed"], about["image"], about["label"]) == (7, 2, 2)
    assert about["sampling"]["num_inference_steps"] == 4
    assert {file.name for file in made.files} == {"samples.npz", "grid.png", "report.json"}
    assert made.report["network_evaluations"] == 3 * (4 + 2)  # guidance acts at two of the four steps


def test_one_class_and_another_size_than_the_trained_one(studio):
    made = create(studio, Request.read(studio, DIGITS, label=5, count=2, steps=1, height=16, width=8), Job(""))
    assert [made.about(k)["label"] for k in (0, 1)] == [5, 5]
    assert Image.open(made.pictures[0][0]).size == (8, 16)


def test_every_kind_of_checkpoint_draws(studio):
    known = studio.catalog.checkpoints()
    assert {DIGITS, "ddt-emoji-text", "saved:mine", "run:first", "run:second"} <= set(known)
    assert known["run:first"].classes == tuple("0123456789")
    assert known["ddt-emoji-text"].takes_text and known["ddt-emoji-text"].prompts
    for name in ("saved:mine", "run:first"):
        assert create(studio, Request.read(studio, name, count=1, steps=2), Job("")).pictures


def test_watching_changes_nothing(studio):
    request = Request.read(studio, DIGITS, first_image=4, steps=6, seed=3)
    seen = watch(studio, request, Job(""))
    pipe = untwine.load(DIGITS)
    alone = pipe(class_labels=[4], first_image=4, seed=3, num_inference_steps=6).images[0]
    assert np.array_equal(np.asarray(seen.final), np.asarray(alone))
    assert [frame.step for frame in seen.frames] == list(range(6))
    assert seen.times == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert seen.guided == [False, False, True, True, True, True]  # (0, 0.7)
    last = np.asarray(seen.frames[-1].x0, np.int16)
    assert np.abs(last - np.asarray(alone, np.int16)).max() <= 1  # the last step jumps to the predicted x0
    with Image.open(seen.animation) as animation:
        assert animation.n_frames == 7
    strip = film(seen.frames, seen.final)
    assert strip.count("<img") == 14 and "step 5" in strip
    assert 'class="uw-marked"' in speed_chart(seen)


def test_long_runs_are_watched_at_some_of_their_steps(studio):
    seen = watch(studio, Request.read(studio, DIGITS, steps=60), Job(""))
    assert len(seen.frames) == 24 and len(seen.speeds) == 60
    assert (seen.frames[0].step, seen.frames[-1].step) == (0, 59)


def test_sharing_is_measured_planned_compared_and_saved(studio):
    request = Request.read(studio, DIGITS, count=4, steps=10)
    found = share.measure(studio, request, Job(""))
    assert found.similarity.shape == (10, 10)
    assert np.allclose(np.diag(found.similarity), 1)
    assert found.refresh(10, "uniform") == tuple(range(10))
    assert found.refresh(5, "uniform") == (0, 2, 4, 6, 8)
    compared = share.compare(studio, found, 4, 1, "similarity", Job(""))
    assert len(compared.refresh) == 4 and compared.refresh[0] == 0
    assert compared.shared.encoder_passes < compared.exact.encoder_passes
    assert compared.shared.network_evaluations == compared.exact.network_evaluations
    pipe = untwine.load(DIGITS)
    plan = SharingPlan.load(compared.plan)
    planned = pipe(num_images=4, plan=plan, output_type="np").images
    assert np.array_equal((planned * 255).round().astype(np.uint8), compared.shared.images)
    assert "encoder passes an image" in show_sides(compared)
    exact = share.compare(studio, found, 10, 2, "uniform", Job(""))
    assert not exact.difference.any()
    with pytest.raises(Refused, match="press Measure first"):
        share.compare(studio, None, 4, 1, "similarity", Job(""))
    with pytest.raises(Refused, match=r"budget must be a whole number within \[1, 10\], got 11"):
        found.refresh(11, "similarity")


def test_a_run_is_shown_alone_and_beside_another(studio):
    assert set(studio.catalog.runs()) == {"first", "second"}
    run = runs.read_run(studio, "first")
    assert run.curve("loss")[-1] == (8, run.train[-1]["loss"])
    assert list(run.sheets) == [4, 8]
    assert run.sheet(7)[0] == 4 and run.sheet(100)[0] == 8 and run.sheet(0)[0] == 4
    assert run.facts["step"] == "8"
    alone, both = show([run]), show(runs.read_runs(studio, "first", "second"))
    assert "validation" in alone and "first: validation" not in alone
    assert "first: validation" in both and "second: validation" in both
    assert show_sheets([run], 4).count("<img") == 1
    assert runs.read_runs(studio, "first", "first") == [run]
    with pytest.raises(Refused, match="no run is chosen"):
        runs.read_runs(studio, None, "")


def test_a_torn_line_and_a_run_without_samples(studio, ground, tmp_path):
    folder = tmp_path / "runs" / "torn"
    folder.mkdir(parents=True)
    line = json.dumps({"kind": "train", "step": 2, "loss": 0.5, "lr": 0.1})
    (folder / "log.jsonl").write_text(f'{line}\n{{"kind": "train", "st')
    torn = make_studio(ground, tmp_path / "out")
    torn.catalog.runs_root = (tmp_path / "runs").resolve()
    run = runs.read_run(torn, "torn")
    assert run.curve("loss") == [(2, 0.5)]
    assert "train.sample-every" in show_sheets([run], 2)


def test_an_evaluation_by_protocol(studio, monkeypatch):
    quick = Protocol(name="quick", encoder="pixels", num_samples=40, metrics=("fd", "kid"), principal_axes=8)
    monkeypatch.setitem(PROTOCOLS, "quick", quick)
    assert "quick" in measure.protocols() and "adm-50k" not in measure.protocols()
    told = []
    request = Request.read(studio, DIGITS, steps=2, seed=5)
    found = measure.evaluate(studio, request, DIGITS, "quick", 40, Job("", lambda *at: told.append(at)))
    assert found.values["samples"]["seed"] == 5
    assert found.values["counts"] == {"samples": 40, "reference": 1797, "reference_pictures": 1797}
    assert [row["metric"].split()[0] for row in found.rows] == ["Fréchet", "KID"]
    assert json.loads(found.file.read_text())["metrics"] == found.values["metrics"]
    assert found.nearest is not None and Image.open(found.nearest).size[0] > 100
    assert told[-1] == (40, 40, "comparing with real pictures")
    with pytest.raises(Refused, match=r"samples must be a whole number within \[2, 1000\]"):
        measure.evaluate(studio, request, DIGITS, "quick", 10**9, Job(""))
    with pytest.raises(Refused, match="reference 'folder' is not on the list"):
        measure.evaluate(studio, request, "folder", "quick", 40, Job(""))


def test_all_benchmark_results_can_be_shown(studio):
    names = studio.catalog.results()
    assert len(names) > 10
    for path in names.values():
        tables = measure.read_results(path)
        assert tables and all(len(row) == len(part.columns) for part in tables for row in part.rows)
    tables = {part.title: part for part in measure.read_results(names["imports"])}
    seconds = json.loads(names["imports"].read_text())["seconds"]
    shown = {row[0]: row[1:] for part in tables.values() for row in part.rows}
    assert set(map(str, seconds)) <= set(shown) | set(tables[next(t for t in tables if "seconds" in t)].columns)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, r"steps must be a whole number within \[1, 250\], got 0"),
        ({"steps": -3}, "steps must be"),
        ({"steps": 2.5}, "steps must be"),
        ({"steps": 10**9}, "steps must be"),
        ({"steps": "fifty"}, "steps must be"),
        ({"steps": "5" * 10_000}, "steps must be"),
        ({"steps": "٥"}, "steps must be"),
        ({"steps": [50]}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"count": 17}, r"count must be a whole number within \[1, 16\], got 17"),
        ({"count": float("nan")}, "count must be"),
        ({"guidance": float("inf")}, r"guidance must be a number within \[0, 30\]"),
        ({"guidance": -1}, "guidance must be"),
        ({"guidance_from": 0.8, "guidance_to": 0.3}, "guidance from must be below guidance to"),
        ({"label": 10}, r"label must be a whole number within \[-1, 9\]"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"solver": "rm -rf"}, "solver 'rm -rf' is not on the list; choose one of: euler"),
        ({"height": 65536, "width": 64}, r"height must be a whole number within \[1, 1024\]"),
        ({"height": 8}, "width must be"),
        ({"height": 1024, "width": 1024, "count": 5}, "at most 3 images of this size"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(studio, given, message):
    with pytest.raises(Refused, match=message):
        Request.read(studio, DIGITS, **given)


def test_prompts(studio):
    with pytest.raises(Refused, match="prompt has 1000001 characters, and at most 1000 are taken; shorten it"):
        Request.read(studio, "ddt-emoji-text", prompt="x" * 1_000_001)
    with pytest.raises(Refused, match="prompt must be a text"):
        Request.read(studio, "ddt-emoji-text", prompt=["a"])
    assert Request.read(studio, "ddt-emoji-text", prompt=" a\x00\x1b[31m \n cat ").prompt == "a [31m cat"
    assert Request.read(studio, DIGITS, prompt="ignored").prompt == ""


def test_the_library_s_own_refusals_reach_the_page(studio):
    with pytest.raises(ValueError, match="nearest") as refused:
        create(studio, Request.read(studio, "ddt-fashion", height=31, width=32, steps=3), Job(""))
    assert explain(refused.value) == "Size (31, 32) does not divide into patches; the nearest that does is (32, 32)"


def test_a_stopped_job_leaves_nothing(studio):
    running = Job("")

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            running.stop.set()

    running._tell = stop
    with pytest.raises(Stopped) as stopped:
        create(studio, Request.read(studio, DIGITS, steps=200), running)
    assert stopped.value.step <= 4
    assert str(stopped.value) == f"Stopped after step {stopped.value.step} of 200."
    assert studio.outputs.sets() == []


@pytest.mark.parametrize("what", [share.measure, watch])
def test_whatever_computes_can_be_stopped(studio, what):
    running = Job("", lambda done, total, _: done == 3 and running.stop.set())
    with pytest.raises(Stopped) as stopped:
        what(studio, Request.read(studio, DIGITS, steps=100), running)
    assert stopped.value.step <= 5


def test_jobs_run_one_at_a_time_and_only_their_owner_stops_them():
    jobs = Jobs()
    with jobs.run("mine") as job:
        assert jobs.cancel("other") is None and not job.stop.is_set()
        assert jobs.cancel("mine", wait_seconds=0) is job and job.stop.is_set()
    assert jobs.cancel("mine") is None
    with jobs.run("mine") as job:
        job.check()


def test_errors_give_nothing_away(caplog):
    assert explain(ValueError("steps must be small")) == "Steps must be small"
    for error in (ValueError("cannot read /etc/passwd"), KeyError("PATH"), RuntimeError("at /home/me")):
        told = explain(error)
        number = re.fullmatch(r"Something went wrong here. The log has the details under error (\w{8})\.", told)
        assert number and number[1] in caplog.text


def test_outputs_keep_to_their_size_and_touch_nothing_else(ground, tmp_path):
    studio = make_studio(ground, tmp_path, max_output_mib=0.01)
    mine = tmp_path / "mine.txt"
    mine.write_text("x" * 50_000)
    made = []
    for k in range(4):
        folder = studio.outputs.new()
        (folder / "a.bin").write_bytes(b"x" * 4000)
        studio.outputs.trim()
        made.append(folder)
        assert len(studio.outputs.sets()) == min(k + 1, 2)
    assert studio.outputs.sets() == made[-2:] and mine.is_file()


def test_limits_and_roots_must_make_sense(tmp_path):
    with pytest.raises(ValueError, match="max_count must be > 0, got 0"):
        Limits(max_count=0)
    with pytest.raises(ValueError, match="root must be a folder that exists"):
        untwine_studio(root=tmp_path / "nowhere", outputs=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="outputs: cannot write"):
        untwine_studio(outputs=tmp_path / "file" / "out")


def untwine_studio(**options):
    from untwine.app.studio import Studio

    return Studio(**options)


def test_everything_from_outside_is_escaped():
    evil = "<script>alert(1)</script>"
    shown = (
        note(evil, evil),
        facts({evil: evil}),
        table(evil, [evil], [[evil, evil]]),
        line_chart(evil, {evil: [(0, 1), (1, 2)], "b": [(0, 1)]}, evil, evil),
        heat_map(evil, np.eye(3), [0], evil),
    )
    for html in shown:
        assert "<script" not in html and "&lt;script&gt;" in html


def test_charts_take_what_logs_hold():
    assert line_chart("empty", {}, "x", "y") == ""
    assert line_chart("nan", {"a": [(0, float("nan"))]}, "x", "y") == ""
    flat = line_chart("flat", {"a": [(5, 2.0)]}, "x", "y", log=True)
    assert "polyline" in flat and "nan" not in flat
    falling = line_chart("t", {"a": [(1.0, 1.0), (0.0, 2.0)]}, "t", "y", falling=True)
    start, end = re.search(r'points="([\d.]+),[\d.]+ ([\d.]+),', falling).groups()
    assert float(start) < float(end)  # noise on the left
