"""Every registered codec keeps the contract of ``untwine.codecs.base.Codec``; autoencoders agree with diffusers."""

import json
import shutil

import diffusers
import pytest
import torch

from tests.raes import save_diffusers
from tests.vaes import CLASSES, KL, save_vae
from untwine.codecs import CODECS
from untwine.codecs.base import Codec
from untwine.codecs.identity import IdentityCodec
from untwine.codecs.moments import Moments
from untwine.codecs.tiling import decode_frames, decode_tiles
from untwine.codecs.vae import VAECodec
from untwine.config import Component, from_dict, to_dict
from untwine.diffusion.draws import Draws

SAMPLE = (3, 16, 16)


@pytest.fixture(params=sorted(CODECS))
def component(request, tmp_path):
    folders = {"rae": save_diffusers, "vae": save_vae}
    options = {"path": str(folders[request.param](tmp_path / "model"))} if request.param in folders else {}
    return Component("untwine.codecs:CODECS", request.param, options)


@pytest.fixture
def codec(component):
    return component.build()


def samples(count=3, shape=SAMPLE):
    return Draws(0).uniform("sample", shape, range(count)) * 2 - 1


def test_shapes_and_inverse(codec):
    x = samples()
    encoding = codec.encode(x, draws=Draws(1), index=torch.arange(3))
    assert tuple(encoding.latents.shape[1:]) == codec.latent_shape(SAMPLE)
    assert encoding.mean.shape == encoding.latents.shape
    assert encoding.latents.dtype == torch.float32
    assert codec.sample_shape(codec.latent_shape(SAMPLE)) == SAMPLE
    decoded = codec.decode(encoding.latents, side=encoding.side, tile=8, chunk=1)
    assert decoded.shape == x.shape
    if isinstance(codec, IdentityCodec):  # the others have random weights, which restore nothing
        low, high = codec.value_range
        assert (decoded - x).abs().max() <= 0.1 * (high - low)


def test_a_row_depends_on_its_counter_alone(codec):
    x, draws = samples(), Draws(1)
    together = codec.encode(x, draws=draws, index=torch.arange(3)).latents
    alone = codec.encode(x[2:], draws=draws, index=torch.tensor([2])).latents
    assert torch.allclose(together[2:], alone, atol=1e-5)


def test_without_draws_the_mean_is_taken(codec):
    encoding = codec.encode(samples())
    assert torch.equal(encoding.latents, encoding.mean)


def test_options_survive_a_round_trip(component, codec):
    data = component.to_dict()
    options = {k: v for k, v in data.items() if k != "kind"}
    assert Component(component.registry, data["kind"], options).to_dict() == data
    assert isinstance(codec, Codec)


def test_a_fingerprint_is_json_and_repeatable(component, codec):
    assert json.loads(json.dumps(codec.fingerprint())) == codec.fingerprint() == component.build().fingerprint()


def test_moments_draw_what_the_codec_draws(codec):
    x, draws, index = samples(), Draws(1), torch.tensor([4, 9, 2])
    expected = codec.encode(x, draws=draws, index=index)
    stochastic = expected.std is not None
    stored = torch.cat([expected.mean, expected.std], 1) if stochastic else expected.mean
    moments = Moments(codec, stochastic)
    assert torch.equal(moments.encode(stored, draws=draws, index=index).latents, expected.latents)
    assert torch.equal(moments.decode(expected.latents), codec.decode(expected.latents))
    shape = tuple(stored.shape[1:])
    assert moments.latent_shape(shape) == codec.latent_shape(SAMPLE)
    assert moments.sample_shape(moments.latent_shape(shape)) == shape
    assert (
        moments.decoded_shape(moments.latent_shape(shape)) == codec.decoded_shape(codec.latent_shape(SAMPLE)) == SAMPLE
    )


def test_identity_is_exact_and_affine():
    x = samples()
    assert torch.equal(IdentityCodec().encode(x).latents, x)
    assert torch.equal(IdentityCodec().decode(x), x)
    codec = IdentityCodec(scale=0.5, shift=0.25)
    latents = codec.encode(x).latents
    assert torch.equal(latents, (x - 0.25) / 2)
    assert torch.allclose(codec.decode(latents), x, atol=1e-6)
    assert codec.encode(x).std is None
    assert codec.fingerprint() != IdentityCodec().fingerprint()


def test_identity_options():
    codec = from_dict(IdentityCodec, {"scale": 2})
    assert to_dict(codec) == {"kind": "identity", "scale": 2.0, "shift": 0.0}
    with pytest.raises(ValueError, match="scale must be finite and not 0, got 0"):
        IdentityCodec(scale=0.0)
    with pytest.raises(ValueError, match="shift must be finite, got nan"):
        IdentityCodec(shift=float("nan"))


def frames_for(name):
    return (3, 5, 32, 32) if name in ("AutoencoderKLQwenImage", "AutoencoderKLWan") else (3, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_autoencoders_agree_with_diffusers(name, tmp_path):
    folder = save_vae(tmp_path / "vae", name)
    codec, vae = VAECodec(str(folder)), getattr(diffusers, name.split()[0]).from_pretrained(folder).eval()
    x, draws, index = samples(2, frames_for(name)), Draws(1), torch.tensor([5, 8])
    shift, scale = CLASSES[name][1]
    shift, scale = (torch.tensor(v).view(1, -1, *([1] * (x.ndim - 2))) for v in (shift, scale))
    encoded, encoding = vae.encode(x), codec.encode(x, draws=draws, index=index)
    assert codec.latent_shape(tuple(x.shape[1:])) == tuple(encoding.latents.shape[1:])
    if hasattr(encoded, "latent_dist"):
        noise = draws.normal("codec/posterior", encoding.latents.shape[1:], index)
        raw = encoded.latent_dist.mean + encoded.latent_dist.std * noise
        assert torch.allclose(encoding.std, encoded.latent_dist.std / scale, atol=1e-6)
    else:
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        assert encoding.std is None
    assert torch.allclose(encoding.latents, (raw - shift) / scale, atol=1e-5)
    assert torch.allclose(codec.decode(encoding.latents), vae.decode(raw).sample, atol=1e-4)


@torch.no_grad()
def test_an_image_is_one_frame_of_a_video_network(tmp_path):
    codec = VAECodec(str(save_vae(tmp_path / "vae", "AutoencoderKLWan")))
    x = samples(2, (3, 16, 16))
    latents = codec.encode(x).latents
    assert latents.shape == (2, *codec.latent_shape((3, 16, 16))) == (2, 4, 2, 2)
    assert torch.equal(latents, codec.encode(x.unsqueeze(2)).latents.squeeze(2))
    assert codec.decode(latents).shape == x.shape
    assert codec.causal_time
    with pytest.raises(ValueError, match=r"cannot restore samples of shape \(3, 4, 16, 16\).*\(3, 1, 16, 16\)"):
        codec.latent_shape((3, 4, 16, 16))


def test_a_video_goes_through_an_image_network_frame_by_frame(tmp_path):
    codec = VAECodec(str(save_vae(tmp_path / "vae")))
    x = samples(2, (3, 4, 16, 16))
    latents = codec.encode(x).latents
    assert tuple(latents.shape[1:]) == codec.latent_shape((3, 4, 16, 16)) == (4, 4, 8, 8)
    for t in range(4):
        assert torch.allclose(latents[:, :, t], codec.encode(x[:, :, t]).latents, atol=1e-5)
    assert torch.allclose(codec.decode(latents, chunk=3), codec.decode(latents), atol=1e-5)
    with pytest.raises(ValueError, match="chunk must be at least 1 frame, got 0"):
        codec.decode(latents, chunk=0)


def test_tiles_equal_the_whole_where_the_decoder_is_local():
    kernel = Draws(0).normal("kernel", (3, 4, 3, 3), [0])[0]

    def decode(z):
        return torch.nn.functional.interpolate(torch.nn.functional.conv2d(z, kernel), scale_factor=2)

    def padded(z):
        return decode(torch.nn.functional.pad(z, (1, 1, 1, 1), mode="replicate"))

    z = Draws(0).normal("z", (4, 23, 9), [0])
    whole, calls = padded(z), []
    tiled = decode_tiles(lambda part: calls.append(part.shape[-2:]) or padded(part), z, 8)
    assert len(calls) == 8
    assert set(calls) == {(8, 8)}
    error = (tiled - whole).abs()
    assert error.mean() < 0.1 * whole.abs().mean()  # only rows at a cut see the padding, at a small weight
    assert torch.allclose(decode_tiles(lambda part: part * 2, z, 8), z * 2, atol=1e-6)
    assert torch.equal(decode_tiles(padded, z, 23), whole)
    assert torch.equal(decode_frames(lambda part: part + 1, z[:, :, None], 1), z[:, :, None] + 1)
    with pytest.raises(ValueError, match="tile must be at least 4 latent pixels, got 3"):
        decode_tiles(padded, z, 3)


def test_weights_are_frozen_read_late_and_in_the_asked_precision(tmp_path):
    folder = save_vae(tmp_path / "vae")
    codec = VAECodec(str(folder), dtype="bfloat16")
    assert codec._module is None
    latents = codec.encode(samples()).latents
    assert latents.dtype == codec.decode(latents).dtype == torch.float32
    assert {p.dtype for p in codec._module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in codec._module.parameters())
    assert not codec._module.training
    exact = VAECodec(str(folder)).encode(samples()).latents
    assert 0 < (latents - exact).abs().max() < 0.1 * exact.abs().max()


def test_given_statistics_normalise(tmp_path):
    folder = save_vae(tmp_path / "vae")
    raw = VAECodec(str(folder), mean=(0.0,), std=(1.0,)).encode(samples(8)).mean
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    codec = VAECodec(str(folder), mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    latents = codec.encode(samples(8)).mean
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(codec.decode(latents), VAECodec(str(folder)).decode(raw * 0.18215), atol=1e-4)
    with pytest.raises(ValueError, match=r"must have 1 or 4 values.*got 3 and 3"):
        VAECodec(str(folder), mean=(0.0,) * 3, std=(1.0,) * 3).encode(samples())
    for options in ({"mean": (0.0,)}, {"std": (1.0,)}, {"mean": (0.0,), "std": (0.0,)}):
        with pytest.raises(ValueError, match="mean and std must be given together"):
            VAECodec(str(folder), **options)


def test_latents_far_from_unit_deviation_are_warned_of(tmp_path, caplog):
    folder = save_vae(tmp_path / "vae")
    VAECodec(str(folder), mean=(0.0,), std=(1e-3,)).encode(samples(8))
    assert "outside 0.5-2" in caplog.text


def test_fingerprints_tell_codecs_apart(tmp_path):
    first, second = save_vae(tmp_path / "a"), save_vae(tmp_path / "b", seed=1)
    shutil.copytree(first, tmp_path / "moved")
    base = VAECodec(str(first)).fingerprint()
    assert VAECodec(str(tmp_path / "moved")).fingerprint() == base
    others = {
        "weights": VAECodec(str(second)),
        "dtype": VAECodec(str(first), dtype="bfloat16"),
        "mean": VAECodec(str(first), mean=(1.0,), std=(1 / 0.18215,)),
        "config": VAECodec(str(save_vae(tmp_path / "c", scaling_factor=0.5))),
    }
    for field, codec in others.items():
        assert codec.fingerprint()[field] != base[field], field


def test_bad_folders(tmp_path):
    folder = save_vae(tmp_path / "pipe" / "vae")
    assert VAECodec(str(tmp_path / "pipe"), subfolder="vae").fingerprint() == VAECodec(str(folder)).fingerprint()
    with pytest.raises(ValueError, match=r"no config\.json of an autoencoder; its subfolders with one: vae"):
        VAECodec(str(tmp_path / "pipe"))
    with pytest.raises(ValueError, match=r"codec\.path must be a folder or a hub id owner/name, got 'nowhere'"):
        VAECodec("nowhere")
    with pytest.raises(ValueError, match="is no local folder, and the hub did not give it"):
        VAECodec("nobody/nothing")
    with pytest.raises(ValueError, match=r"cannot take samples of shape \(1, 16, 16\); it encodes 3 channels"):
        VAECodec(str(folder)).latent_shape((1, 16, 16))
    with pytest.raises(ValueError, match=r"cannot restore samples of shape \(3, 17, 16\).*\(3, 16, 16\)"):
        VAECodec(str(folder)).encode(samples(1, (3, 17, 16)))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded as a AutoencoderKL"):
        VAECodec(str(folder)).encode(samples())
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks diffusion_pytorch_model\.safetensors.*may be a pickle"):
        VAECodec(str(folder))


def test_weights_and_configs_that_do_not_fit(tmp_path):
    folder = save_vae(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())

    def refused(message, **changes):
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
        with pytest.raises(ValueError, match=message):
            VAECodec(str(folder)).encode(samples())

    refused("the parameters in .* are not those|cannot be loaded", layers_per_block=2)
    refused("is no config of a AutoencoderKL", down_block_types=["NoSuchBlock"])
    refused("holds a UNet2DModel, which is no autoencoder", _class_name="UNet2DModel")
    refused(r"config\.json' is damaged|config\.json is damaged", _class_name=None)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLFlux2", **KL}))
    with pytest.raises(ValueError, match=r"does not say how .* give codec\.mean and codec\.std"):
        VAECodec(str(folder))
