"""Watching a run: what it shows, to whom, and that it changes nothing."""

from __future__ import annotations

import builtins
import io
import json
import logging
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny
from untwine.contracts import Condition
from untwine.data.base import CorruptImage
from untwine.models import MODELS
from untwine.pipelines.loading import load
from untwine.pipelines.series import sample
from untwine.training import speed
from untwine.training.control import Profiler, deterministic
from untwine.training.distributed import Distributed
from untwine.training.loggers import LOGGERS, Logger, TensorBoard, Trackio, Wandb
from untwine.training.metering import LossMeter, read_log
from untwine.training.speed import Speed, flops, gemm_peak
from untwine.training.trainer import Trainer
from untwine.training.validation import Validation
from untwine.training.watching import Watch, flat

ALONE = Distributed(torch.device("cpu"))


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.networks.tensors().items()}


# Arithmetic


@pytest.mark.parametrize("shape, patch_size", [((3, 8, 8), 2), ((1, 12, 8), 4)])
@pytest.mark.parametrize(
    "name, depths",
    [
        ("ddt", {"depth": 5, "encoder_depth": 3}),
        ("improved_dit", {"depth": 3}),
    ],
)
def test_flops_are_those_that_torch_counts(name, depths, shape, patch_size):
    model = MODELS[name](
        in_channels=shape[0], hidden_size=48, num_heads=2, patch_size=patch_size, num_classes=5, **depths
    )
    labels = Condition(labels=torch.tensor([0, 4]))
    # Torch counts attention in each of its forms but the fused one of the CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, *shape), torch.ones(2), labels)
    assert 2 * flops(model, shape) == counter.get_total_flops()


@pytest.mark.parametrize("name, expected", [("ddt", 263.0), ("improved_dit", 237.2)])
def test_flops_of_published_sizes(name, expected):
    with torch.device("meta"):
        model = MODELS[name].from_size("XL")
    assert flops(model, (4, 32, 32)) / 1e9 == pytest.approx(expected, abs=0.1)


def test_flops_of_other_models():
    assert flops(torch.nn.Linear(2, 2), (2,)) is None

    class Declares(torch.nn.Module):
        def flops(self, sample_shape):
            return 7 * sample_shape[0]

    assert flops(Declares(), (3, 4, 4)) == 21


def test_speed_counts_training_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed, "gemm_peak", lambda device, dtype: 1000.0)
    pace = Speed(ALONE, batch_size=8, flops_per_image=10, dtype=torch.float32)
    for _ in range(4):
        now[0] += 0.5
        pace.step()
    with pace.paused():
        now[0] += 100
    found = pace.read(remaining_steps=6)
    assert (found["images_per_second"], found["eta_seconds"]) == (16, 3)
    assert found["gflops"] * 1e9 == pytest.approx(3 * 10 * 16, abs=1e7)
    assert found["peak_share"] == pytest.approx(3 * 10 * 16 / 1000)
    assert found["memory_mib"] > 50
    now[0] += 2
    pace.step()
    assert pace.read(0)["images_per_second"] == 4


def test_gemm_peak_is_a_rate():
    assert 1e8 < gemm_peak(torch.device("cpu")) < 1e14


# The console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_panel_on_a_terminal(tmp_path):
    logger = logging.getLogger("untwine")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    before = sys.stdout, sys.stderr, handler.stream
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, width=120)
    try:
        Trainer(tiny(), tmp_path).fit(console=console)
    finally:
        logger.removeHandler(handler)
    assert (sys.stdout, sys.stderr, handler.stream) == before
    text = "".join(c for c in screen.getvalue() if c.isprintable())
    for shown in ("step 8/8", "loss", "lr", "images/s", "of GEMM peak", "MiB", "validation loss", "left", "tiny"):
        assert shown in text, shown
    last = read_log(tmp_path / "log.jsonl", "train")[-1]
    assert f"{last['loss']:.4f}" in text


def test_lines_elsewhere(tmp_path, caplog):
    Trainer(tiny(), tmp_path).fit(console=Console(file=io.StringIO(), force_terminal=True))
    lines = [r.message for r in caplog.records if r.message.startswith("step")]
    assert [line.split()[1] for line in lines] == ["4", "8", "8"]
    assert "loss" in lines[0] and "images/s" in lines[0] and lines[0].endswith("left")
    assert lines[2].startswith("step 8  validation loss")


def test_log_has_every_number(tmp_path):
    result = Trainer(tiny(), tmp_path).fit()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 4), ("train", 8), ("validation", 8)]
    numbers = ("loss", "grad_norm", "lr", "images_per_second", "eta_seconds", "memory_mib", "gflops", "peak_share")
    assert all(lines[0][name] >= 0 for name in numbers)
    assert lines[1]["eta_seconds"] == 0
    assert len(lines[0]["loss_per_time_bin"]) == 10
    assert result.metrics["peak_share"] == lines[1]["peak_share"]


class Reads(TorchDispatchMode):
    """Counts what a program reads from a device, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_watching_reads_nothing_between_log_lines(tmp_path):
    """One reading a step is left, that of the guard before each update."""
    trainer = Trainer(tiny(**{"train.log_every": 100}), tmp_path)
    with trainer_ready(trainer), Reads() as reads:
        batches = iter(trainer._loader(0, 1, 1))
        counts = []
        for _ in range(3):
            micro = next(batches)
            before = reads.count
            trainer._update(micro)
            trainer.watch.step(1)
            trainer.speed.step()
            counts.append(reads.count - before)
        assert len(set(counts)) == 1
        before = reads.count
        trainer.meter.add_value("x", torch.ones(()))
        assert reads.count == before
        optimizer_reads = _reads_of_optimizer(trainer, reads)
    assert counts[0] - optimizer_reads == 1


def _reads_of_optimizer(trainer, reads) -> int:
    before = reads.count
    trainer.networks.optimizers["model"].step()
    return reads.count - before


class trainer_ready:
    """A trainer between its start and its first step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.trainer.out.mkdir(exist_ok=True)
        self.trainer.watch = Watch(self.trainer.out, self.trainer.recipe, ALONE)
        self.trainer._prepare()

    def __exit__(self, *_: object) -> None:
        pass


# Loggers


@dataclass(frozen=True)
class Note(Logger):
    """Keeps what it is told."""

    told: ClassVar[list] = []
    broken: ClassVar[bool] = False

    def open(self, folder, name, config, step):
        self.told.append(("open", name, config["seed"], step))
        return self

    def log(self, step, values):
        if self.broken:
            raise ConnectionError("no route")
        self.told.append(("log", step, dict(values)))

    def image(self, step, name, path):
        self.told.append(("image", step, name, Image.open(path).size))

    def close(self):
        self.told.append(("close",))


@pytest.fixture
def note(monkeypatch):
    if "test_note" not in LOGGERS:
        LOGGERS.register("test_note", f"{__name__}:Note")
    monkeypatch.setattr(Note, "told", [])
    return {"train.loggers": ["test_note"], "train.sample_every": 4}


def test_a_logger_hears_everything(tmp_path, note):
    Trainer(tiny(**note), tmp_path).fit(until=4)
    Trainer(tiny(**note), tmp_path).fit()
    kinds = [line[:2] for line in Note.told]
    half = [("log", 4), ("log", 4), ("image", 4), ("close",)]
    assert kinds == [("open", "tiny"), *half, ("open", "tiny"), *[(k, 8) if k != "close" else (k,) for k, *_ in half]]
    assert [line[3] for line in Note.told if line[0] == "open"] == [0, 4]
    values = Note.told[1][2]
    assert {"train/loss", "train/loss_per_time_bin/4", "train/images_per_second", "train/lr"} <= values.keys()
    assert all(isinstance(v, float) for v in values.values())
    assert Note.told[2][2]["validation/loss"] > 0


def test_a_failing_logger_stops_nothing(tmp_path, note, monkeypatch, caplog):
    monkeypatch.setattr(Note, "broken", True)
    assert Trainer(tiny(**note), tmp_path).fit().step == 8
    assert caplog.text.count("Note failed, and hears no more of this run: no route") == 1
    assert len(read_log(tmp_path / "log.jsonl", "train")) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    trainer = Trainer(tiny(**{"train.loggers": [name]}), tmp_path)
    with pytest.raises(ImportError, match=rf"train.loggers: {name} is not installed; pip install 'untwine\[{name}\]'"):
        trainer.fit()
    assert trainer.step == 0


class FakePackage(types.ModuleType):
    """The part of wandb's interface that trackio shares."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list = []
        self.Image = lambda path: ("picture", Path(path).name)

    def init(self, **options):
        self.calls.append(options)
        return self

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


@pytest.mark.parametrize("kind, package", [(Wandb, "wandb"), (Trackio, "trackio")])
def test_adapters_that_share_an_interface(tmp_path, monkeypatch, kind, package):
    fake = FakePackage(package)
    monkeypatch.setitem(sys.modules, package, fake)
    sink = kind().open(tmp_path, "mine", {"seed": 1}, 0)
    sink.log(3, {"train/loss": 0.5})
    sink.image(4, "samples", tmp_path / "step-4.png")
    sink.close()
    options, *rest = list(fake.calls)
    assert options["name"].startswith("mine")
    assert (options["project"], options["config"], options["resume"]) == ("untwine", {"seed": 1}, "allow")
    identity = "id" if package == "wandb" else "name"
    kind().open(tmp_path, "mine", {}, 4)
    kind().open(tmp_path / "other", "mine", {}, 0)
    assert fake.calls[-2][identity] == options[identity] != fake.calls[-1][identity]
    assert options.get("mode") == ("offline" if package == "wandb" else None)
    assert rest == [(3, {"train/loss": 0.5}), (4, {"samples": ("picture", "step-4.png")}), "finish"]


def test_tensorboard_files(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    sink = TensorBoard().open(tmp_path, "mine", {}, 0)
    sink.log(3, {"train/loss": 0.5})
    sink.image(4, "samples", tmp_path / "grey.png")
    sink.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(3, 0.5)]
    assert [e.step for e in read.Images("samples")] == [4]


def test_only_finite_numbers_are_passed_on():
    values = {"step": 3, "loss": 0.5, "bins": [1.0, None, float("inf")], "weights": "ema:0", "none": None}
    assert flat("train", values) == {"train/loss": 0.5, "train/bins/0": 1.0}


# Samples while training


def test_samples_while_training_are_those_of_the_pipeline(tmp_path):
    changes = {"train.sample_every": 5, "sampling": {"num_inference_steps": 4, "guidance_scale": 2.0}}
    watched = Trainer(tiny(**changes), tmp_path / "run")
    watched.fit()
    assert sorted(f.name for f in (tmp_path / "run" / "samples").iterdir()) == ["step-5.png", "step-8.png"]
    sheet = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-8.png"))
    cells = sheet.reshape(4, 34, 10, 34).swapaxes(1, 2).reshape(40, 34, 34)[:, 1:-1, 1:-1]
    theirs = sample(load(tmp_path / "run"), count=40, seed=3).images[..., 0]
    assert np.array_equal(cells, cells[:, ::4, ::4].repeat(4, 1).repeat(4, 2))
    difference = np.abs(cells[:, ::4, ::4].astype(int) - theirs)
    assert difference.max() <= 1  # a rounding, where the batch differs
    assert theirs.std() > 10


def test_samples_leave_no_trace(tmp_path):
    plain, watched = (
        Trainer(tiny(**{"train.sample_every": every, "sampling": {"num_inference_steps": 2}}), tmp_path / str(every))
        for every in (None, 3)
    )
    plain.fit()
    watched.fit()
    one, other = state(plain), state(watched)
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    assert watched.networks.model.training


def test_samples_that_cannot_be_drawn_are_refused_at_the_start(tmp_path):
    trainer = Trainer(tiny(**{"train.sample_every": 5}), tmp_path)
    trainer.objective.path = None
    with pytest.raises(ValueError, match=r"train.sample_every needs an objective with a diffusion path.*no path"):
        trainer.fit()
    with pytest.raises(ValueError, match=r"sample_every must be >= 1, or null"):
        tiny(**{"train.sample_every": 0})


# Profiler and deterministic mode


def test_profile(tmp_path, caplog):
    Trainer(tiny(), tmp_path).fit(profile=3)
    trace = json.loads((tmp_path / "profile.json").read_text())
    assert sum(e.get("name", "").startswith("Optimizer.step") for e in trace["traceEvents"]) >= 3
    told = next(r.message for r in caplog.records if "3 steps profiled" in r.message)
    assert "aten::" in told
    assert len([line for line in told.splitlines() if "aten::" in line or "Backward" in line]) <= 10


def test_profile_of_too_short_a_run(tmp_path, caplog):
    Trainer(tiny(**{"train.num_steps": 1}), tmp_path).fit(profile=3)
    assert "ended within the warm-up" in caplog.text
    with pytest.raises(ValueError, match="profile must be >= 1 step, got 0"):
        Profiler(0, tmp_path, ALONE)


def test_deterministic_within_the_run_only(tmp_path):
    seen = []
    trainer = Trainer(tiny(**{"train.deterministic": True}), tmp_path)
    trainer.fit(until=2, on_step=lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(builtins.ZeroDivisionError), deterministic(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise ZeroDivisionError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# Validation


def test_validation_is_the_mean_over_its_triples(tmp_path):
    trainer = Trainer(tiny(**{"train.validation": 61}), tmp_path)
    reads = []
    whole, parts = (
        Validation(trainer.held_out, trainer.codec, seed=3, batch_size=n, processes=ALONE) for n in (549, 100)
    )
    assert len(whole) == 549
    for validation in (whole, parts):
        reads.append(
            validation.measure(
                trainer.networks.modules, trainer.objective, step=0, precision=trainer.networks.forward_precision
            )
        )
    assert reads[0]["loss"] == pytest.approx(reads[1]["loss"], rel=1e-5)
    assert reads[0]["loss_per_time_bin"] == pytest.approx(reads[1]["loss_per_time_bin"], rel=1e-4)


def test_validation_leaves_corrupt_samples_out(tmp_path, monkeypatch):
    trainer = Trainer(tiny(), tmp_path)

    def measure():
        validation = Validation(trainer.held_out, trainer.codec, seed=3, batch_size=60, processes=ALONE)
        return validation.measure(
            trainer.networks.modules, trainer.objective, step=0, precision=trainer.networks.forward_precision
        )["loss"]

    read = trainer.held_out.read

    def damaged(position, **rest):
        if position < 20:
            raise CorruptImage("torn")
        return read(position, **rest)

    complete = measure()
    monkeypatch.setattr(trainer.held_out, "read", damaged)
    assert measure() == pytest.approx(complete, rel=0.2)
    assert measure() != complete
    monkeypatch.setattr(trainer.held_out, "read", lambda position, **rest: damaged(0))
    with pytest.raises(CorruptImage, match="none of the 60 held-out samples"):
        measure()


def test_meter_weighs():
    from untwine.contracts import Loss

    meter = LossMeter(ALONE)
    for value, weight in ((1.0, 1), (4.0, 2), (100.0, 0)):
        per_sample = torch.full((2,), value)
        meter.add(Loss(torch.tensor(value), {}, per_sample, torch.tensor([0.05, 0.95])), weight=weight)
    found = meter.read()
    assert found["loss"] == 3
    assert found["loss_per_time_bin"][0] == 2.5
