"""Every registered codec keeps the contract of ``untwine.codecs.base.Codec``."""

import pytest
import torch

from untwine.codecs import CODECS
from untwine.codecs.base import Codec
from untwine.codecs.identity import IdentityCodec
from untwine.config import Component, from_dict, to_dict
from untwine.diffusion.draws import Draws

SAMPLE = (3, 16, 16)


@pytest.fixture(params=sorted(CODECS))
def codec(request):
    return Component("untwine.codecs:CODECS", request.param).build()


def samples(count=3, shape=SAMPLE):
    return Draws(0).uniform("sample", shape, range(count)) * 2 - 1


def test_shapes_and_inverse(codec):
    x = samples()
    encoding = codec.encode(x, draws=Draws(1), index=torch.arange(3))
    assert tuple(encoding.latents.shape[1:]) == codec.latent_shape(SAMPLE)
    assert encoding.mean.shape == encoding.latents.shape
    assert codec.sample_shape(codec.latent_shape(SAMPLE)) == SAMPLE
    decoded = codec.decode(encoding.latents, side=encoding.side, tile=8, chunk=1)
    assert decoded.shape == x.shape
    if codec.reconstructs:
        low, high = codec.value_range
        assert (decoded - x).abs().max() <= 0.1 * (high - low)


def test_a_row_depends_on_its_counter_alone(codec):
    x, draws = samples(), Draws(1)
    together = codec.encode(x, draws=draws, index=torch.arange(3)).latents
    alone = codec.encode(x[2:], draws=draws, index=torch.tensor([2])).latents
    assert torch.allclose(together[2:], alone, atol=1e-5)


def test_default_options_survive_a_round_trip(codec):
    component = Component("untwine.codecs:CODECS", CODECS.name_of(type(codec)))
    data = component.to_dict()
    options = {k: v for k, v in data.items() if k != "kind"}
    assert Component(component.registry, data["kind"], options).to_dict() == data
    assert isinstance(codec, Codec)


def test_identity_is_exact_and_affine():
    x = samples()
    assert torch.equal(IdentityCodec().encode(x).latents, x)
    assert torch.equal(IdentityCodec().decode(x), x)
    codec = IdentityCodec(scale=0.5, shift=0.25)
    latents = codec.encode(x).latents
    assert torch.equal(latents, (x - 0.25) / 2)
    assert torch.allclose(codec.decode(latents), x, atol=1e-6)
    assert codec.encode(x).std is None


def test_identity_options():
    codec = from_dict(IdentityCodec, {"scale": 2})
    assert to_dict(codec) == {"kind": "identity", "scale": 2.0, "shift": 0.0}
    with pytest.raises(ValueError, match="scale must be finite and not 0, got 0"):
        IdentityCodec(scale=0.0)
    with pytest.raises(ValueError, match="shift must be finite, got nan"):
        IdentityCodec(shift=float("nan"))
