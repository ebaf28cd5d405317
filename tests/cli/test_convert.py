"""``untwine convert``: runs and official weights become pipeline folders, complete or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import untwine as library
from tests.parity.test_official_files import OFFICIAL, SPLIT, official_weights

# What the weights of a network of no published size do not tell.
SIZES = ("--config", "in_channels=4", "--config", "num_encoder_blocks=2")


@pytest.fixture
def official_file(tmp_path):
    """A Lightning checkpoint of a small official network, averages beside the raw weights."""
    averaged, raw = official_weights(SPLIT), official_weights(SPLIT, seed=1)
    state = {f"ema_denoiser.{k}": v for k, v in averaged.items()} | {f"denoiser.{k}": v for k, v in raw.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "official.ckpt")
    return tmp_path / "official.ckpt"


def test_a_run_becomes_a_pipeline(untwine, run_folder, tmp_path):
    status, told, err = untwine("convert", run_folder, "--out", tmp_path / "new" / "mine", "--weights", "ema:1")
    assert (status, err) == (0, "")
    assert f"untwine sample {tmp_path / 'new' / 'mine'}" in told
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["mine"]  # nothing half-made beside it
    pipe, original = library.load(tmp_path / "new" / "mine"), library.load(run_folder, weights="ema:1")
    assert pipe.origin == original.origin
    assert pipe.origin["weights"] == "ema:1"
    assert pipe.sampling == original.sampling
    for name, value in original.model.state_dict().items():
        assert torch.equal(pipe.model.state_dict()[name], value), name
    assert torch.equal(pipe(output_type="pt").images, original(output_type="pt").images)


def test_bfloat16_halves_the_file_and_converts_again(untwine, run_folder, tmp_path):
    untwine("convert", run_folder, "--out", tmp_path / "full")
    untwine("convert", tmp_path / "full", "--out", tmp_path / "half", "--dtype", "bfloat16")
    full, half = (
        (tmp_path / n / "model" / "diffusion_pytorch_model.safetensors").stat().st_size for n in ("full", "half")
    )
    assert half < 0.6 * full
    a, b = library.load(tmp_path / "half").model, library.load(tmp_path / "full").model
    for (name, x), y in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(x, y.to(torch.bfloat16).float()), name


def test_official_weights(untwine, official_file, tmp_path):
    """The averaged weights, as a pipeline with the authors' sampling; without their codec it draws latents."""
    out = tmp_path / "official"
    status, told, _ = untwine("convert", official_file, "--out", out, *SIZES, "--latent-size", 8, 12)
    assert status == 0
    assert "no image codec" in told
    pipe = library.load(out)
    expected = library.DDT.from_official(official_weights(SPLIT), SPLIT)
    for name, value in expected.state_dict().items():
        assert torch.equal(pipe.model.state_dict()[name], value), name
    assert pipe.latent_shape == (4, 8, 12)
    assert (pipe.sampling.num_inference_steps, pipe.sampling.guidance_interval) == (250, (0.0, 0.7))
    assert pipe.origin["weights"] == "ema_denoiser."
    with pytest.raises(ValueError, match=r"output_type 'pil' needs an image codec.*4 channels"):
        pipe(num_inference_steps=1)
    folder = tmp_path / "samples"
    status, told, _ = untwine(
        "sample", out, "--out", folder, "--count", 3, "--num-inference-steps", 2, "--last-step", "None"
    )
    assert status == 0
    assert "latents" in told
    assert sorted(p.name for p in folder.iterdir()) == ["report.json", "samples.npz"]
    arrays = np.load(folder / "samples.npz")
    assert arrays["arr_0"].shape == (3, 4, 8, 12)
    assert arrays["arr_0"].dtype == np.float32
    assert json.loads((folder / "report.json").read_text())["space"] == "latents"


def test_official_options_in_words(untwine, refused, tmp_path):
    torch.save(official_weights(OFFICIAL), tmp_path / "dit.pt")
    told = ("--config", "num_groups=2", "--config", "in_channels=4")
    assert "give either in config" in refused("convert", tmp_path / "dit.pt", "--out", tmp_path / "dit")
    assert untwine("convert", tmp_path / "dit.pt", "--out", tmp_path / "dit", *told)[0] == 0
    assert isinstance(library.load(tmp_path / "dit").model, library.ImprovedDiT)
    message = refused("convert", tmp_path / "dit.pt", "--out", tmp_path / "x", *told, "--config", "num_group=2")
    assert "num_group" in message
    assert "num_groups" in message
    message = refused("convert", tmp_path / "dit.pt", "--out", tmp_path / "x", *SIZES, "--network", "ddt")
    assert "s_embedder.proj.weight" in message
    assert "expected KEY=VALUE, got 'num_groups'" in refused(
        "convert", tmp_path / "dit.pt", "--out", tmp_path / "x", "--config", "num_groups"
    )
    assert not (tmp_path / "x").exists()


def test_a_bare_model_folder_is_sampled_too(official_file, tmp_path):
    from untwine.integrations.official import convert

    convert(official_file, "ddt", {"in_channels": 4, "num_encoder_blocks": 2}, tmp_path / "model")
    pipe = library.load(tmp_path / "model")
    assert pipe(num_inference_steps=1, output_type="latent").images.shape == (1, 4, 32, 32)


def test_an_occupied_folder_is_refused(refused, untwine, run_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    assert untwine("convert", run_folder, "--out", tmp_path / "mine")[0] == 0  # empty: welcome
    message = refused("convert", run_folder, "--out", tmp_path / "mine")
    assert f"out: {tmp_path / 'mine'} exists and is not an empty folder" in message
    (tmp_path / "file").write_text("mine")
    refused("convert", run_folder, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_refusals(refused, run_folder, tmp_path):
    assert "out" in refused("convert", run_folder)
    assert "unknown checkpoint 'nowhere'" in refused("convert", "nowhere", "--out", tmp_path / "x")
    message = refused("convert", run_folder, "--out", tmp_path / "x", "--config", "a=1")
    assert "only official weights take it" in message
    (tmp_path / "file").write_text("")
    assert "out: cannot write to" in refused("convert", run_folder, "--out", tmp_path / "file" / "x")
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    assert "broken.ckpt" in refused("convert", tmp_path / "broken.ckpt", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))


def test_damaged_pipelines_are_refused(refused, untwine, run_folder, tmp_path):
    """Missing parameters would be random numbers, and a truncated file no file at all."""
    from safetensors.torch import load_file, save_file

    untwine("convert", run_folder, "--out", tmp_path / "mine")
    file = tmp_path / "mine" / "model" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "blocks.1.norm1.weight"}, file)
    message = refused("sample", tmp_path / "mine")
    assert "blocks.1.norm1.weight" in message
    save_file(weights | {"extra.weight": torch.zeros(1)}, file)
    assert "extra.weight" in refused("sample", tmp_path / "mine")
    save_file(weights, file)
    file.write_bytes(file.read_bytes()[:-10])
    assert "cannot be loaded as a DDT" in refused("sample", tmp_path / "mine")
    (tmp_path / "mine" / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in refused("sample", tmp_path / "mine")
