"""The decoder of RAE against the official one, and against diffusers' with the same weights."""

import math

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

import untwine
from tests.parity.cases import cases
from tests.raes import DECODER
from untwine.codecs.rae_model import RAE


def as_map(tokens):
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


@torch.no_grad()
@pytest.mark.parametrize("case", cases("rae", klass="GeneralDecoder"))
def test_official_decoder(case):
    model = untwine.from_official("rae-decoder", case.state, case.kwargs)
    tokens = case.inputs["tokens"]
    logits = model.decoder(tokens).logits
    case.check("logits", logits)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.config.pixel_mean, model.config.pixel_std))
    if "pixels" in case.outputs:
        case.check("pixels", (model(as_map(tokens)) - mean) / std)


@torch.no_grad()
@pytest.mark.parametrize("case", cases("rae", klass="GeneralDecoder"))
def test_a_decoder_survives_saving(case, tmp_path):
    model = untwine.from_official("rae-decoder", case.state, case.kwargs)
    model.save_pretrained(tmp_path)
    again, tokens = RAE.from_pretrained(tmp_path), case.inputs["tokens"]
    assert torch.equal(again.decoder(tokens).logits, model.decoder(tokens).logits)


@torch.no_grad()
def test_diffusers_decoder_with_the_same_weights():
    """Its table of positions is the official one for 16 x 16 patches; for others ours must not be its."""
    for side in (16, 8):
        model = RAE(representation=None, latent_shape=(24, side, side), **DECODER)
        theirs = RAEDecoder(
            hidden_size=24,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=128,
            num_patches=side**2,
            patch_size=4,
            image_size=4 * side,
        )
        theirs.load_state_dict(model.decoder.state_dict())
        tokens = torch.randn(2, side**2, 24, generator=torch.Generator().manual_seed(side))
        same = torch.allclose(model.decoder(tokens).logits, theirs(tokens).logits, atol=1e-6)
        assert same == (side == 16)
