"""``untwine convert`` of RAE: runs of stage 1 and official decoders become codecs, official heads pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import untwine as library
from tests.official import HEAD, SIDE, decoder_of_rae, head_of_rae
from tests.raes import DECODER, features, save_encoder
from untwine.codecs.rae import RAECodec
from untwine.config import to_dict
from untwine.diffusion.timesteps import dimension_shift
from untwine.integrations.official import load_official_file
from untwine.integrations.published import published
from untwine.models import MODELS
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for k in range(12):
        levels = np.random.default_rng(k).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((32, 32), Image.Resampling.BICUBIC).save(root / f"{k:02d}.png")
    return root


@pytest.fixture(scope="module")
def stage_one(pictures, tmp_path_factory):
    """A finished run of a recipe like rae-emoji."""
    recipe = {
        "name": "rae-tiny",
        "data": {"kind": "folder", "root": str(pictures), "resolution": 32, "layout": "flat"},
        "model": {"kind": "rae", "representation": to_dict(features()), **DECODER},
        "objective": {"kind": "reconstruction", "perceptual": None},
        "ema": [{"kind": "constant", "decay": 0.5}],
        "train": {"num_steps": 2, "batch_size": 4, "validation": 0},
    }
    folder = tmp_path_factory.mktemp("runs") / "rae-tiny"
    Trainer(Recipe.from_dict(recipe), folder).fit()
    return folder


@pytest.fixture
def decoder_file(tmp_path):
    torch.save(decoder_of_rae(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def head_file(tmp_path):
    torch.save(head_of_rae(), tmp_path / "stage2_model.pt")
    return tmp_path / "stage2_model.pt"


def test_a_run_of_stage_one_becomes_the_codec_of_stage_two(untwine, refused, stage_one, pictures, tmp_path):
    """Convert, train on its latents, sample pictures: three command lines."""
    codec = tmp_path / "codec"
    status, told, err = untwine("convert", stage_one, "--out", codec)
    assert status == 0, err
    assert f"codec: {{kind: rae, path: {codec}}}" in told
    assert "(24, 8, 8)" in told and "to 32 x 32 pixels" in told
    x = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in sorted(pictures.iterdir())])
    latents = RAECodec(str(codec)).encode(x.permute(0, 3, 1, 2).float() / 127.5 - 1).latents
    assert latents.mean(0).abs().max() < 1e-3  # statistics of the training set
    recipe = {
        "name": "stage-two",
        "data": {"kind": "folder", "root": str(pictures), "resolution": 32, "layout": "flat"},
        "codec": {"kind": "rae", "path": "is given by a flag"},
        "model": {"kind": "ddt", "hidden_size": 32, "depth": 2, "encoder_depth": 1, "num_heads": 2, "patch_size": 2},
        "train": {"num_steps": 1, "batch_size": 4, "validation": 0},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "two"
    assert untwine("train", tmp_path / "two.yaml", "--out", run, "--codec.path", codec)[0] == 0
    pictures_of = tmp_path / "samples"
    status, told, _ = untwine("sample", run, "--out", pictures_of, "--count", 2, "--num-inference-steps", 1)
    assert status == 0 and "2 images" in told
    assert Image.open(pictures_of / "000000.png").size == (32, 32)
    assert "bfloat16" not in refused("convert", stage_one, "--out", tmp_path / "x", "--weights", "ema:3")
    assert "written in float32" in refused("convert", stage_one, "--out", tmp_path / "x", "--dtype", "bfloat16")
    assert not (tmp_path / "x").exists()


def test_an_official_decoder_becomes_a_codec(untwine, decoder_file, tmp_path):
    mean, var = torch.randn(64, SIDE, SIDE), torch.rand(64, SIDE, SIDE) + 0.1
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    out, heads = tmp_path / "codec", ("--config", "decoder_num_attention_heads=2")
    status, told, _ = untwine(
        "convert", decoder_file, "--out", out, "--system", "rae-decoder", *heads, "--statistics", tmp_path / "stat.pt"
    )
    assert status == 0 and "a decoder alone" in told
    expected = library.from_official("rae-decoder", decoder_of_rae(), {"decoder_num_attention_heads": 2})
    codec, z = RAECodec(str(out)), torch.randn(2, 64, SIDE, SIDE)
    for name, value in expected.decoder.state_dict().items():
        assert torch.equal(codec.model().decoder.state_dict()[name], value), name
    raw = z * (var + 1e-5).sqrt() + mean
    torch.testing.assert_close(codec.decode(z), expected(raw) * 2 - 1, atol=1e-5, rtol=0)


def test_an_official_decoder_joins_its_encoder(untwine, tmp_path):
    torch.save(decoder_of_rae(side=16), tmp_path / "model.pt")
    encoder, out = save_encoder(tmp_path / "encoder", "dinov2"), tmp_path / "codec"
    heads = ("--config", "decoder_num_attention_heads=2")
    system = ("--system", "rae-decoder", "--encoder", encoder)
    status, told, _ = untwine("convert", tmp_path / "model.pt", "--out", out, *system, *heads)
    assert status == 0 and "AutoencoderRAE" in told
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    codec = RAECodec(str(out))
    assert codec.decode(codec.encode(x).latents).shape == (1, 3, 64, 64)


def test_an_official_head_draws_pictures_by_an_official_decoder(untwine, refused, head_file, decoder_file, tmp_path):
    """Bitwise the network of from_official, with the published steps, the shift of its latents, and its codec."""
    decoder, heads = tmp_path / "decoder", ("--config", "decoder_num_attention_heads=2")
    untwine("convert", decoder_file, "--out", decoder, "--system", "rae-decoder", *heads)
    out = tmp_path / "head"
    status, told, err = untwine("convert", head_file, "--out", out, "--system", "rae", "--codec", decoder)
    assert (status, err) == (0, "")
    assert "note" not in told
    pipe, expected = library.load(out), library.from_official("rae", head_of_rae(), HEAD)
    assert isinstance(pipe.model, library.DDTHead)
    for name, value in expected.state_dict().items():
        assert torch.equal(pipe.model.state_dict()[name], value), name
    assert pipe.latent_shape == (64, SIDE, SIDE)
    sampling = pipe.sampling
    assert (sampling.num_inference_steps, sampling.grid_end, sampling.guidance_scale) == (49, 0.001, 1.0)
    assert sampling.shift == 1.0  # of 64 x 4 x 4 numbers, fewer than 4096
    assert pipe(num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
    message = refused("convert", head_file, "--out", tmp_path / "x", "--system", "rae", "--codec", head_file.parent)
    assert "holds no config.json of an autoencoder" in message
    torch.save(decoder_of_rae(channels=24), tmp_path / "other.pt")
    untwine("convert", tmp_path / "other.pt", "--out", tmp_path / "other", "--system", "rae-decoder", *heads)
    message = refused("convert", head_file, "--out", tmp_path / "x", "--system", "rae", "--codec", tmp_path / "other")
    assert "decodes latents of (24, 4, 4), got (64, 4, 4)" in message
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("system", "file", "likeness"),
    [
        ("rae-decoder", "head_file", "weights of rae"),
        ("rae", "decoder_file", "weights of rae-decoder"),
        ("dit", "head_file", "weights of rae"),
        ("ddt", "decoder_file", "weights of rae-decoder"),
    ],
)
def test_files_of_another_system_say_which(refused, request, tmp_path, system, file, likeness):
    path = request.getfixturevalue(file)
    assert f"looks like {likeness}" in refused("convert", path, "--out", tmp_path / "x", "--system", system)
    assert not (tmp_path / "x").exists()


def test_options_of_others_are_refused(refused, head_file, decoder_file, stage_one, tmp_path):
    head = ("convert", head_file, "--out", tmp_path / "x", "--system", "rae")
    decoder = ("convert", decoder_file, "--out", tmp_path / "x", "--system", "rae-decoder")
    message = refused(*head, "--encoder", tmp_path)
    assert f"encoder: only official decoders (--system rae-decoder) take it, not {head_file}" in message
    assert "latent_size: only official networks take it" in refused(*decoder, "--latent-size", 4, 4)
    message = refused("convert", stage_one, "--out", tmp_path / "x", "--codec", tmp_path)
    assert f"codec: only official networks take it, not {stage_one}" in message
    assert "not mean and var (stat.pt)" in refused(*decoder, "--statistics", head_file)
    assert "holds no" in refused(*head, "--codec", tmp_path / "absent")


SETTINGS = {
    ("rae", "ddt_head", (768, 16, 16)): (49, 1.0, None),
    ("ddt-head", "ddt_head", (768, 16, 16)): (50, 4.8, [0.0, 0.9]),
    ("ddt-head", "ddt_head", (4, 32, 32)): (50, 1.6, [0.0, 0.9]),
    ("ddt-head", "ddt_head", (3, 256, 256)): (50, 1.0, None),
    ("repa", "sit", (4, 32, 32)): (250, 1.8, [0.0, 0.7]),
    ("sit", "sit", (4, 32, 32)): (250, 1.5, None),
    ("lightningdit", "lightningdit", (32, 16, 16)): (None, 1.0, None),
}


@pytest.mark.parametrize(("key", "expected"), SETTINGS.items(), ids=str)
def test_published_settings(key, expected):
    """Of the briefs of their papers; every one is a valid Sampling."""
    from untwine.config import from_dict
    from untwine.diffusion.sampling import Sampling

    system, network, shape = key
    options = {"conditioning": "tokens"} if system == "ddt-head" else {}
    with torch.device("meta"):
        model = MODELS[network](
            in_channels=shape[0], depth=2, **({"encoder_depth": 1} if network == "ddt_head" else {}), **options
        )
    found = published(system, network, model.config, shape)
    told = (found.get("num_inference_steps"), found.get("guidance_scale", 1.0), found.get("guidance_interval"))
    assert told == expected
    from_dict(Sampling, found, "sampling")
    if system in ("rae", "ddt-head"):
        assert found["shift"] == (1.0 if shape[0] == 3 else dimension_shift(shape))


def test_files_that_hold_no_statistics(tmp_path):
    torch.save({"mean": None, "var": None}, tmp_path / "stat.pt")
    with pytest.raises(ValueError, match="no tensors"):
        load_official_file(tmp_path / "stat.pt")
