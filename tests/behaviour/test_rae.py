"""Representation autoencoders: what the codec gives, and stage 1 of their training."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderRAE
from PIL import Image
from transformers import AutoModel, Dinov2Config, Dinov2Model

import untwine
from tests.raes import DECODER, features, save_diffusers, save_encoder, tiny_rae
from tests.vaes import save_vae
from untwine.codecs.rae import RAECodec, compute_statistics, set_statistics, to_diffusers
from untwine.codecs.rae_features import FeatureMaps
from untwine.codecs.rae_model import RAE
from untwine.codecs.rae_siglip import nested_siglip
from untwine.config import Component, to_dict
from untwine.contracts import Batch, Condition
from untwine.diffusion.draws import Draws
from untwine.encoders.base import Encoder
from untwine.training.checkpoint import read_state
from untwine.training.objectives.discriminator import Discriminator, diff_augment, hinge
from untwine.training.objectives.reconstruction import (
    Adversary,
    Perceptual,
    Reconstruction,
    adaptive_weight,
    export,
    quantised,
)
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer


def pictures(count=4, side=16, seed=0):
    """In [-1, 1]."""
    return Draws(seed).uniform("pictures", (3, side, side), range(count)) * 2 - 1


@pytest.fixture(scope="module")
def photographs():
    """(N, 3, 32, 32) in [-1, 1]: crops of real photographs."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    crops = [im[y : y + 64 : 2, x : x + 64 : 2] for im in images for y in range(0, 320, 64) for x in range(0, 576, 64)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


# The codec


@torch.no_grad()
@pytest.mark.parametrize("kind, patch", [("dinov2", 4), ("siglip2", 4), ("mae", 8)])
def test_the_codec_gives_what_diffusers_gives(kind, patch, tmp_path):
    """Patch 8 is the upsampling decoder; the noise of training, in the config, has no part in encoding."""
    folder = save_diffusers(tmp_path, encoder_type=kind, patch_size=patch, noise_tau=0.8)
    with nested_siglip():  # this diffusers cannot build SigLIP with transformers 5
        theirs = AutoencoderRAE.from_pretrained(folder).eval()
    codec, x = RAECodec(str(folder)), pictures(2, 4 * patch)
    latents = codec.encode(x).latents
    assert torch.equal(latents, theirs.encode((x + 1) / 2).latent)
    assert torch.equal(latents, codec.encode(x, draws=Draws(1), index=torch.arange(2)).latents)
    assert torch.equal(codec.decode(latents), theirs.decode(latents).sample * 2 - 1)
    assert codec.sample_shape((64, 4, 4)) == (3, 4 * patch, 4 * patch) == tuple(x.shape[1:])


@torch.no_grad()
def test_statistics_are_exact_and_follow_the_official_rule(tmp_path):
    """(z - mean) / sqrt(var + 1e-5), also where the variance is as small as that, on both kinds of autoencoder."""
    codec = RAECodec(str(save_diffusers(tmp_path / "raw")))
    x = pictures(10)
    z = codec.represent(x).double()
    mean, var = compute_statistics(codec.represent, x.split(3))
    torch.testing.assert_close(mean, z.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(var, z.var(0, correction=0), atol=1e-6, rtol=0)
    var[0] = 1e-6
    set_statistics(codec.model(), mean, var)
    codec.model().save_pretrained(tmp_path / "normalised")
    again = RAECodec(str(tmp_path / "normalised"))
    torch.testing.assert_close(again.encode(x).latents.double(), (z - mean) / (var + 1e-5).sqrt(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.represent(x).double(), z, atol=1e-5, rtol=0)
    ours = RAE(representation=None, latent_shape=(64, 4, 4), **DECODER)
    set_statistics(ours, mean, var)
    decoded = ours.decode(again.encode(x).latents).sample
    torch.testing.assert_close(decoded, ours(z.float()), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_an_official_decoder_joins_its_encoder(kind, tmp_path):
    """Decoder file and stat.pt with a checkpoint of transformers: the last norm loses its affine weights."""
    mean, var = torch.randn(64, 16, 16), torch.rand(64, 16, 16) + 0.1
    blank = RAE(representation=None, latent_shape=(64, 16, 16), **DECODER)
    official = {name.replace(".attention.to_q.", ".attention.attention.query."): v for name, v in _state(blank).items()}
    for ours, theirs in (("to_k", "attention.key"), ("to_v", "attention.value"), ("to_out.0", "output.dense")):
        official = {name.replace(f".attention.{ours}.", f".attention.{theirs}."): v for name, v in official.items()}
    config = {"decoder_num_attention_heads": 2, "num_patches": 256}
    decoder = untwine.from_official("rae-decoder", {**official, "mean": mean, "var": var}, config)
    encoder = save_encoder(tmp_path / "encoder", kind)
    to_diffusers(decoder, encoder).save_pretrained(tmp_path / "rae")
    codec = RAECodec(str(tmp_path / "rae"))
    x = pictures(2, 64)
    latents = codec.encode(x).latents
    assert latents.shape == (2, 64, 16, 16)
    raw = _last_tokens(AutoModel.from_pretrained(encoder), kind, (x + 1) / 2)
    torch.testing.assert_close(latents, (raw - mean) / (var + 1e-5).sqrt(), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(codec.decode(latents), decoder(raw) * 2 - 1, atol=2e-3, rtol=1e-3)
    small = RAE(representation=None, latent_shape=(64, 4, 4), **DECODER)
    with pytest.raises(ValueError, match="positions of 16 x 16 patches only, this one has 16"):
        to_diffusers(small, encoder)
    wide = RAE(representation=None, latent_shape=(128, 16, 16), **DECODER)
    with pytest.raises(ValueError, match=r"of width 64; the decoder needs .* of width 128"):
        to_diffusers(wide, encoder)


def _state(model):
    return dict(model.decoder.state_dict())


def _last_tokens(model, kind, images):
    """(B, 64, 16, 16): the last hidden states under a norm without affine weights, by transformers itself."""
    side = 256 if kind == "siglip2" else 224
    mean, std = ((torch.tensor(v).view(1, 3, 1, 1)) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (F.interpolate(images, (side, side), mode="bicubic") - mean) / std
    vision = getattr(model, "vision_model", model)
    norm = vision.post_layernorm if kind == "siglip2" else vision.layernorm
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    if kind == "mae":
        model.config.mask_ratio = 0.0
        hidden = model(x, noise=torch.arange(256.0).expand(len(x), -1)).last_hidden_state
    else:
        hidden = model(x).last_hidden_state
    return hidden[:, -256:].transpose(1, 2).unflatten(2, (16, 16))


@torch.no_grad()
def test_an_autoencoder_of_ours(tmp_path):
    model = tiny_rae().eval()
    x = pictures(3, 32)
    z = model.represent((x + 1) / 2)
    assert z.shape == (3, 24, 8, 8)
    assert z.mean(1).abs().max() < 1e-5
    assert (z.var(1, correction=0) - 1).abs().max() < 1e-3
    assert not any("representation" in name or "network" in name for name in model.state_dict())
    set_statistics(model, *compute_statistics(model.represent, [(x + 1) / 2]))
    model.save_pretrained(tmp_path / "rae")
    for dtype, tolerance in (("float32", 0.0), ("bfloat16", 0.05)):
        codec = RAECodec(str(tmp_path / "rae"), dtype=dtype)
        latents = codec.encode(x).latents
        torch.testing.assert_close(latents, model.encode((x + 1) / 2).latent, atol=1e-6, rtol=0)
        torch.testing.assert_close(codec.decode(latents), model(z) * 2 - 1, atol=tolerance + 1e-4, rtol=0)
    larger = tiny_rae(patch_size=8)
    assert larger(z).shape == (3, 3, 64, 64)


@torch.no_grad()
def test_other_numbers_of_tokens_are_resized():
    """The embedding is affine, so that resizing what is embedded is resizing what is given."""
    decoder, z = RAE(representation=None, latent_shape=(24, 4, 4), **DECODER), torch.randn(2, 24, 8, 8)
    small = F.interpolate(z, (4, 4), mode="bilinear")
    torch.testing.assert_close(decoder(z), decoder(small), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"latents must be square, .* got \(2, 24, 4, 8\)"):
        decoder(z[:, :, :4])


def test_maps_of_encoders():
    maps = features("network._blocks.0", "network._blocks.4")
    assert maps.shapes() == [(16, 16, 16), (40, 4, 4)]
    x = ((pictures(2, 32) + 1) / 2).requires_grad_()
    maps(x)[1].square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert features("tokens").shapes() == [(1280, 1, 1)]
    with pytest.raises(ValueError, match=r"efflite0 has no module 'blocks\.3'"):
        features("blocks.3").shapes()
    for site, found in (("network._fc", r"\(1, 1000\)"), ("network._dropout", "None")):
        with pytest.raises(ValueError, match=rf"efflite0 at '{site}' gives no spatial map .*, but {found}"):
            features(site).shapes()
    with pytest.raises(ValueError, match="sites must name at least one place"):
        FeatureMaps(sites=())


@torch.no_grad()
def test_class_tokens_are_left_out(tmp_path):
    """A site of a vision transformer gives its patch tokens as a map."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, patch_size=14, image_size=56)
    Dinov2Model(config).save_pretrained(tmp_path)
    encoder = Component(Encoder.kinds, "dinov2", {"path": str(tmp_path), "side": 56})
    maps, x = FeatureMaps(encoder=encoder, sites=("network.encoder.layer.0", "tokens")), pictures(2, 56)
    block, tokens = maps((x + 1) / 2)
    assert block.shape == tokens.shape == (2, 16, 4, 4)
    normed = maps.network.network.layernorm(block.flatten(2).transpose(1, 2))
    torch.testing.assert_close(normed, maps.network((x + 1) / 2).tokens)


# Stage 1


def batch(count=4, seed=0, first=0):
    index = torch.arange(first, first + count)
    return Batch(pictures(count, 32, seed), Condition(), index)


def run(objective, networks, data, update="model", step=0):
    return objective(networks, data, update=update, step=step, draws=Draws(3))


def test_the_loss_is_that_of_the_paper():
    model, data = tiny_rae(), batch()
    clean = Reconstruction(tau=0.0, perceptual=None)
    loss = run(clean, {"model": model}, data)
    real = (data.x0 + 1) / 2
    error = (model(model.represent(real)) - real).abs()
    torch.testing.assert_close(loss.total, error.mean())
    torch.testing.assert_close(loss.per_sample, error.mean((1, 2, 3)).detach())
    term = Perceptual(features=features("network._blocks.0", "network._blocks.2"), scale=0.5, start_step=2)
    both = Reconstruction(tau=0.0, perceptual=term)
    assert torch.equal(run(both, {"model": model}, data, step=1).total, loss.total)
    later = run(both, {"model": model}, data, step=2)
    torch.testing.assert_close(later.total, loss.total + 0.5 * later.parts["perceptual"])
    assert term.distance(real, real) < 1e-9
    fake = model(model.represent(real))
    cosines = [F.cosine_similarity(a, b, dim=1).mean() for a, b in zip(term.features(fake), term.features(real))]
    torch.testing.assert_close(later.parts["perceptual"], sum(2 - 2 * c for c in cosines) / 2, atol=1e-5, rtol=1e-4)


def test_noise_is_a_function_of_the_sample():
    objective, zeros = Reconstruction(tau=0.8, perceptual=None), torch.zeros(64, 24, 8, 8)
    whole = objective._noisy(zeros, batch(64), Draws(3))
    part = objective._noisy(zeros[:2], batch(2, first=5), Draws(3))
    assert torch.equal(whole[5:7], part)
    deviation = whole.flatten(1).std(1) / 0.8
    assert deviation.min() >= 0 and deviation.max() <= 1.1
    assert abs(deviation.mean() - 0.5) < 0.15
    assert torch.equal(objective.eval()._noisy(zeros, batch(64), Draws(3)), zeros)


def test_the_adaptive_weight_balances_gradients():
    w = torch.randn(4, 3, requires_grad=True)
    loss, gan = (w * 3).square().sum(), (w.sin() * 0.01).sum()
    weight = adaptive_weight(loss, gan, w)
    sizes = [torch.autograd.grad(value, w, retain_graph=True)[0].norm() for value in (loss, weight * gan)]
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-3, atol=0)
    assert adaptive_weight(loss, gan, w, max_weight=2.0) == 2
    assert not weight.requires_grad


def test_the_adversary_and_its_schedule():
    gan = Adversary(features=features("network._blocks.2"), train_step=1, start_step=2)
    objective = Reconstruction(perceptual=None, adversary=gan)
    assert [objective.updates(step) for step in range(3)] == [("model",), *[("model", "discriminator")] * 2]
    networks = {"model": tiny_rae(), "discriminator": objective.networks()["discriminator"].init()}
    assert "gan" not in run(objective, networks, batch(), step=1).parts
    loss = run(objective, networks, batch(), step=2)
    parts = loss.parts
    torch.testing.assert_close(loss.total, parts["l1"] + 0.75 * parts["gan_weight"] * parts["gan"])
    loss.total.backward()
    assert all(p.grad is not None for p in networks["model"].parameters())
    networks["model"].zero_grad()
    run(objective, networks, batch(), "discriminator", step=1).total.backward()
    assert all(p.grad is None for p in networks["model"].parameters())
    assert all(p.grad is not None for p in networks["discriminator"].parameters())
    objective.eval()
    with torch.no_grad():
        assert "gan" not in run(objective, networks, batch(), step=2).parts


def test_a_discriminator_learns_to_tell_blurred_from_real(photographs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Discriminator(features("network._blocks.0", "network._blocks.2"))
    assert judge(photographs[:2]).shape == (2, 16**2 + 8**2)
    for head in judge.heads:
        weight = head.entry[0].weight.flatten(1)
        assert abs(torch.linalg.matrix_norm(weight, 2) - 1) < 0.2
    blurred = F.avg_pool2d(F.pad(photographs, (1, 1, 1, 1), mode="replicate"), 3, 1)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, betas=(0.9, 0.95))
    train, test = slice(0, None, 2), slice(1, None, 2)
    for _ in range(15):
        loss = hinge(judge(photographs[train]), judge(blurred[train]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        wins = judge(photographs[test]).mean(1) > judge(blurred[test]).mean(1)
    assert wins.float().mean() > 0.9


def test_augmentation():
    x, index = pictures(6, 32), torch.arange(6)
    once = diff_augment(x, Draws(1), "real", index)
    assert torch.equal(once[4:], diff_augment(x[4:], Draws(1), "real", index[4:]))
    assert not torch.equal(once, diff_augment(x, Draws(1), "fake", index))
    flat = diff_augment(torch.zeros(64, 3, 32, 32), Draws(1), "real", torch.arange(64))[:, :, 8:24, 8:24]
    assert (flat - flat[:, :1, :1, :1]).abs().max() < 1e-6
    assert -0.5 <= flat.min() < -0.4 < 0.4 < flat.max() <= 0.5
    point = torch.zeros(64, 3, 32, 32)
    point[:, :, 16, 16] = 100.0
    places = diff_augment(point, Draws(1), "real", torch.arange(64)).sum(1).flatten(1).argmax(1)
    rows, columns = places // 32 - 16, places % 32 - 16
    for moved in (rows, columns):
        assert moved.min() == -4 and moved.max() == 4


def test_fakes_have_the_levels_of_files():
    levels = (quantised(torch.linspace(-2, 2, 4001)) + 1) * 127.5
    assert torch.equal(levels.round().unique(), torch.arange(256.0))
    assert (levels - levels.round()).abs().max() < 1e-4


def stage_one(root, **train):
    return Recipe.from_dict(
        {
            "name": "stage-one",
            "data": {"kind": "folder", "root": str(root), "resolution": 32, "layout": "flat"},
            "model": {"kind": "rae", "representation": to_dict(features()), **DECODER},
            "objective": {
                "kind": "reconstruction",
                "perceptual": {"features": to_dict(features("network._blocks.0"))},
                "adversary": {"features": to_dict(features("network._blocks.2")), "train_step": 1, "start_step": 2},
            },
            "optimizer": {"kind": "adamw", "lr": 2e-3},
            "ema": [{"kind": "constant", "decay": 0.5}],
            "train": {"num_steps": 4, "batch_size": 8, "validation": 0, "save_every": 2, **train},
        }
    )


@pytest.fixture
def folder(photographs, tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for i, x in enumerate(photographs[:40]):
        levels = ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(root / f"{i:03d}.png")
    return root


def test_stage_one_resumes_exports_and_serves_stage_two(folder, tmp_path):
    whole = Trainer(stage_one(folder), tmp_path / "whole")
    result = whole.fit()
    assert {"l1", "perceptual", "gan", "gan_weight", "discriminator/loss"} <= result.metrics.keys()
    Trainer(stage_one(folder), tmp_path / "parts").fit(until=2)
    parts = Trainer(stage_one(folder), tmp_path / "parts")
    assert parts.fit().step == 4
    assert parts.networks.updates == {"model": 4, "discriminator": 3}
    for name, value in whole.networks.tensors().items():
        assert torch.equal(value, parts.networks.tensors()[name]), name
    assert read_state(result.checkpoint)["latent_shape"] == [3, 32, 32]

    with pytest.raises(
        ValueError, match=r"whole trained an autoencoder, which draws nothing.*untwine convert .*whole --out"
    ):
        untwine.load(tmp_path / "whole")
    export(tmp_path / "whole", tmp_path / "codec")
    codec = RAECodec(str(tmp_path / "codec"))
    x = torch.stack([whole.training_set.read(i) for i in range(len(whole.training_set))])
    latents = codec.encode(x).latents
    assert latents.mean(0).abs().max() < 1e-3
    assert abs(float(latents.square().mean()) - 1) < 1e-2
    with whole.networks.averaged(), torch.no_grad():
        expected = whole.networks.model(whole.networks.model.represent((x[:4] + 1) / 2)) * 2 - 1
    torch.testing.assert_close(codec.decode(latents[:4]), expected, atol=1e-4, rtol=0)

    stage_two = {
        "name": "stage-two",
        "data": stage_one(folder).data.to_dict(),
        "codec": {"kind": "rae", "path": str(tmp_path / "codec")},
        "model": {"kind": "ddt", "hidden_size": 32, "depth": 2, "encoder_depth": 1, "num_heads": 2, "patch_size": 1},
        "train": {"num_steps": 1, "batch_size": 4, "validation": 0},
    }
    trainer = Trainer(Recipe.from_dict(stage_two), tmp_path / "two")
    assert trainer.networks.model.config.in_channels == 24
    assert trainer.fit().step == 1


# What is refused


def test_exports_that_cannot_be_made(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint of a run"):
        export(tmp_path / "nothing", tmp_path / "codec")
    Trainer(stage_one(folder, num_steps=1), tmp_path / "run").fit()
    with pytest.raises(ValueError, match=r"has no 'ema:1' \(known: ema:0, raw\)"):
        export(tmp_path / "run", tmp_path / "codec", weights="ema:1")
    (tmp_path / "codec").mkdir()
    with pytest.raises(ValueError, match="exists; choose a new folder"):
        export(tmp_path / "run", tmp_path / "codec")


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="must be a folder or a hub id owner/name, got 'nowhere'"):
        RAECodec("nowhere")
    with pytest.raises(ValueError, match=r"AutoencoderKL, not one of AutoencoderRAE, RAE; try codec\.kind: vae"):
        RAECodec(str(save_vae(tmp_path / "vae")))
    folder = save_diffusers(tmp_path / "rae")
    codec = RAECodec(str(folder))
    with pytest.raises(ValueError, match=r"cannot restore samples of shape \(3, 32, 32\); it decodes to \(3, 16, 16\)"):
        codec.encode(pictures(1, 32))
    with pytest.raises(ValueError, match=r"decodes latents of \(64, 4, 4\), got \(64, 8, 8\)"):
        codec.decode(torch.zeros(1, 64, 8, 8))
    with pytest.raises(ValueError, match=r"statistics must have shape \(64, 4, 4\), got \(64,\)"):
        set_statistics(codec.model(), torch.zeros(64), None)
    with pytest.raises(ValueError, match="batches holds no pictures"):
        compute_statistics(codec.represent, [])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decoder_hidden_size": 64}))
    with pytest.raises(ValueError, match=r"cannot be loaded as a AutoencoderRAE|are not those of its"):
        RAECodec(str(folder)).encode(pictures(1))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        RAECodec(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks diffusion_pytorch_model\.safetensors"):
        RAECodec(str(folder))


def test_decoders_of_another_size():
    state = _state(RAE(representation=None, latent_shape=(24, 4, 4), **DECODER))
    given = {"decoder_num_attention_heads": 2, "num_patches": 16}
    for config, message in (
        ({**given, "patch_size": 8}, r"config contradicts the weights .*'patch_size': \(8, 4\)"),
        ({**given, "decoder_num_hidden_layers": 2}, "config contradicts the weights"),
        ({"decoder_num_attention_heads": 2}, "the weights do not tell num_patches"),
        ({"num_patches": 16}, "the weights do not tell decoder_num_attention_heads"),
        ({**given, "num_patches": 15}, "a square number, got .* 15"),
    ):
        with pytest.raises(ValueError, match=message):
            untwine.from_official("rae-decoder", state, config)
    damaged = {**state, "decoder_norm.weight": torch.ones(31)}
    with pytest.raises(ValueError, match=r"does not fit the decoder \(1 parameters\): decoder_norm.weight"):
        untwine.from_official("rae-decoder", damaged, given)
    moved = {**state, "decoder_pos_embed": torch.ones(1, 17, 32)}
    with pytest.raises(ValueError, match="is not the fixed sine-cosine table"):
        untwine.from_official("rae-decoder", moved, given)
    with pytest.raises(ValueError, match=r"mean must have the shape of the latents, \(24, 4, 4\), got \(24,\)"):
        untwine.from_official("rae-decoder", {**state, "mean": torch.ones(24)}, given)
    with pytest.raises(ValueError, match="looks like weights of rae-decoder"):
        untwine.from_official("dit", state)


def test_models_and_objectives_that_do_not_fit():
    with pytest.raises(ValueError, match=r"must name one place, got \('network._blocks.0', 'network._blocks.2'\)"):
        tiny_rae(representation=features("network._blocks.0", "network._blocks.2"))
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads 3"):
        tiny_rae(num_heads=3)
    with pytest.raises(ValueError, match="give it where there is no representation"):
        RAE(representation=None)
    with pytest.raises(ValueError, match="without its encoder; put them together"):
        RAE(representation=None, latent_shape=(24, 4, 4)).represent(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="and the decoder was trained on those of 1234"):
        tiny_rae(encoder_sha256="1234").represent(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"the decoder makes pictures of \(3, 64, 64\), the data has \(3, 32, 32\)"):
        run(Reconstruction(perceptual=None), {"model": tiny_rae(patch_size=8)}, batch())
    with pytest.raises(ValueError, match="tau must be >= 0"):
        Reconstruction(tau=-1.0)
    with pytest.raises(ValueError, match=r"train_step must be within \[0, start_step = 2\], got 3"):
        Adversary(train_step=3, start_step=2)
    with pytest.raises(ValueError, match="scale and start_step must be >= 0"):
        Perceptual(start_step=-1)
    assert math.isclose(Adversary().scale, 0.75)
