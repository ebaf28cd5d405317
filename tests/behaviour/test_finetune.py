"""Fine-tuning: ``untwine train X --init RUN`` starts from the weights that fit, and says which those are."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import untwine
from tests.tiny import tiny
from untwine.adapters.lora import load_lora
from untwine.cli import main
from untwine.data.digits import Digits
from untwine.training.metering import read_log
from untwine.training.trainer import Trainer

TABLE = "label_embedder"


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on the ten digits; its two averages and its raw weights differ."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    Trainer(tiny(), folder).fit()
    return folder


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    """Digits 0, 1 and 2 as class folders of pictures."""
    root = tmp_path_factory.mktemp("data") / "three"
    digits = Digits()
    for k in range(120):
        if digits.labels[k] < 3:
            folder = root / ["zero", "one", "two"][digits.labels[k]]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = ((digits.images[k, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


def recipe(root, **changes):
    data = {"kind": "folder", "root": str(root), "resolution": 8, "channels": 1}
    return tiny(**{"data": data, "train.num_steps": 1, "train.validation": 5, "train.batch_size": 8, **changes})


@pytest.mark.parametrize("weights", ["ema:0", "ema:1", "raw"])
def test_other_classes_keep_everything_but_the_label_table(digits_run, three_classes, tmp_path, weights, monkeypatch):
    trainer = Trainer(recipe(three_classes), tmp_path, init=digits_run, init_weights=weights)
    start: dict[str, torch.Tensor] = {}
    update = Trainer._update

    def first(self, *args):
        start.update({n: t.clone() for n, t in self.networks.tensors().items()})
        return update(self, *args)

    monkeypatch.setattr(Trainer, "_update", first)
    trainer.fit()
    expected = dict(untwine.load(digits_run, weights=weights).model.named_parameters())
    table = [name for name in expected if name.startswith(TABLE)]
    assert table
    for name, value in expected.items():
        if name in table:
            assert start[f"model.{name}"].shape == (3 + 1, 32)  # and the null class
            assert start[f"model.{name}"].std() > 0
        else:
            assert torch.equal(start[f"model.{name}"], value), name
        # The averages start from the same weights, not from the random ones that were built first.
        assert torch.equal(start[f"ema.0.{name}"], start[f"model.{name}"]), name
        assert torch.equal(start[f"ema.1.{name}"], start[f"model.{name}"]), name
    assert trainer.report is not None
    assert list(trainer.report.reinitialised) == table
    assert sorted(trainer.report.kept) == sorted(set(expected) - set(table))


def test_the_command_says_what_was_kept(digits_run, three_classes, tmp_path, capsys):
    file = tmp_path / "three.yaml"
    data = recipe(three_classes).to_dict()
    for told_by_data in ("in_channels", "num_classes"):
        del data["model"][told_by_data]
    file.write_text(yaml.safe_dump(data))
    out = tmp_path / "run"
    assert main(["train", str(file), "--out", str(out), "--init", str(digits_run)]) == 0
    told = capsys.readouterr().err
    line = next(line for line in told.splitlines() if line.startswith("initialised from"))
    assert f"{digits_run} (ema:0)" in line
    assert f"re-initialised: {TABLE}" in line
    (logged,) = read_log(out / "log.jsonl", "init")
    assert logged["source"] == str(digits_run)
    assert [name.partition(".")[0] for name in logged["reinitialised"]] == [TABLE]
    pipe = untwine.load(out)
    assert pipe.class_names == ["one", "two", "zero"]
    assert pipe.num_classes == 3
    # The same command continues the run and does not start from the other one again.
    assert main(["train", str(file), "--out", str(out), "--init", str(digits_run), "--train.num-steps", "2"]) == 0
    told = capsys.readouterr().err
    assert "resumed" in told
    assert "initialised" not in told


def test_same_classes_keep_everything_and_start_better(digits_run, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        tuned = Trainer(tiny(**{"train.num_steps": 1}), tmp_path / "tuned", init=digits_run, init_weights="raw")
        after = tuned.fit().metrics["validation_loss"]
    assert tuned.report is not None
    assert not tuned.report.reinitialised
    assert "re-initialised: none" in caplog.text
    fresh = Trainer(tiny(**{"train.num_steps": 1}), tmp_path / "fresh").fit().metrics["validation_loss"]
    assert after < 0.97 * fresh


WRONG = {
    "no folder": ("nowhere", "ema:0", "unknown checkpoint 'nowhere'"),
    "a folder without checkpoints": (".", "ema:0", ". holds no checkpoint of a run"),
    "unknown weights": (None, "ema:5", "has no 'ema:5' (known: ema:0, ema:1, raw)"),
}


@pytest.mark.parametrize("init, weights, expected", WRONG.values(), ids=WRONG)
def test_wrong_init_is_refused(digits_run, three_classes, tmp_path, capsys, monkeypatch, init, weights, expected):
    monkeypatch.chdir(tmp_path)
    flags = ["--data.root", str(three_classes), "--init", str(init or digits_run), "--init-weights", weights]
    assert main(["train", "folder", "--out", "run", *flags]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", ["flat", "classes", "captions"])
def test_the_folder_recipe_takes_any_folder(tmp_path, capsys, layout):
    rng = np.random.default_rng(0)
    root = tmp_path / "mine"
    for k in range(12):
        file = root / (f"kind{k % 2}" if layout == "classes" else "") / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(file)
        if layout == "captions":
            file.with_suffix(".txt").write_text(f"picture {k}")
    small = ["--model.hidden-size", "16", "--model.depth", "2", "--model.encoder-depth", "1", "--model.num-heads", "2"]
    short = ["--train.num-steps", "1", "--train.batch-size", "4", "--train.validation", "2"]
    assert main(["train", "folder", "--data.root", str(root), "--out", str(tmp_path / "run"), *small, *short]) == 0
    told = capsys.readouterr().out
    assert ("captions are read, but the recipe has no condition" in told) == (layout == "captions")
    pipe = untwine.load(tmp_path / "run")
    assert pipe.latent_shape == (3, 64, 64)
    assert pipe.class_names == (["kind0", "kind1"] if layout == "classes" else [])
    assert pipe.num_classes == len(pipe.class_names)
    assert pipe(num_inference_steps=1).images[0].size == (64, 64)


ADAPTER = {"kind": "lora", "rank": 4}


def test_an_adapter_is_trained_on_a_frozen_model(digits_run, tmp_path):
    """Only the adapter moves; the run resumes bitwise, and samples as its adapter on the model it started from does."""
    recipe = tiny(adapter=ADAPTER, **{"train.num_steps": 12, "optimizer.lr": 5e-2})
    trainer = Trainer(recipe, tmp_path / "lora", init=digits_run)
    trainer.fit()
    base = untwine.load(digits_run).model.state_dict()
    for name, value in trainer.networks.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer.", ".")]), name
    assert any(value.abs().max() > 0 for name, value in trainer.networks.model.state_dict().items() if "lora_B" in name)
    parts = Trainer(recipe, tmp_path / "parts", init=digits_run)
    parts.fit(until=3)
    parts = Trainer(recipe, tmp_path / "parts", init=digits_run)
    parts.fit()
    for name, value in parts.networks.tensors().items():
        assert torch.equal(value, trainer.networks.tensors()[name]), name
    pipe = untwine.load(digits_run)

    def drawn(source):
        return source(class_labels=[1, 2, 3, 4], num_inference_steps=3, output_type="latent").images

    plain = drawn(pipe)
    with load_lora(pipe.model, tmp_path / "lora" / "adapter"):
        attached = drawn(pipe)
    assert torch.allclose(drawn(untwine.load(tmp_path / "lora")), attached, atol=1e-4)
    assert not torch.allclose(attached, plain, atol=1e-2)
    assert torch.equal(drawn(pipe), plain)


def test_an_adapter_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an adapter needs a trained model"):
        Trainer(tiny(adapter=ADAPTER), tmp_path).fit()


def test_init_from_anything_that_can_be_sampled(tmp_path, capsys):
    """The shipped checkpoint, by name and as a saved folder."""
    untwine.load("ddt-digits").save_pretrained(tmp_path / "saved")
    short = ["--train.num-steps", "1", "--train.batch-size", "8", "--train.validation", "10"]
    for source in ("ddt-digits", tmp_path / "saved"):
        out = tmp_path / f"run-{len(str(source))}"
        assert main(["train", "ddt-digits", "--init", str(source), "--out", str(out), *short]) == 0
        event = read_log(out / "log.jsonl", "init")[0]
        assert (event["kept"], event["reinitialised"]) == (len(list(untwine.load(out).model.parameters())), [])


def test_posthoc_weights_are_sampled(tmp_path):
    changes = {"train.num_steps": 40, "train.ema_snapshots_every": 5, "train.batch_size": 4}
    Trainer(tiny(**changes), tmp_path).fit()
    images = untwine.sample(untwine.load(tmp_path, weights="posthoc:0.1"), count=2, num_inference_steps=2).images
    assert images.shape == (2, 8, 8, 1)
    for weights, message in (("posthoc:x", "posthoc:SIGMA"), ("posthoc:0.9", "sigma_rel must be within")):
        with pytest.raises(ValueError, match=message):
            untwine.load(tmp_path, weights=weights)
