"""DiT in folders of diffusers: back without a bit lost, computing as the official network, or refused."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from tests.foreign import generate
from untwine.integrations.diffusers import cache
from untwine.integrations.diffusers_models import OfficialDiT, from_diffusers, to_diffusers
from untwine.models.dit import DiT
from untwine.models.sit import SiT

SIZES = {"in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 1000}
INPUTS = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 2])}


def network(**changes) -> DiT:
    torch.manual_seed(0)
    model = DiT(**{**SIZES, **changes}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def options(model) -> dict:
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"learn_sigma": False, "patch_size": 4, "in_channels": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_a_folder_and_back(changes, dtype, tmp_path):
    """untwine -> diffusers folder -> untwine: configuration, dtype and every bit, whichever class reads the folder."""
    model = network(**changes).to(dtype)
    to_diffusers(model, sample_size=8).save_pretrained(tmp_path)
    plain = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    for back in (from_diffusers(tmp_path, dtype=dtype), from_diffusers(plain)):
        assert options(back) == options(model) and back.dtype == dtype
        for name, value in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], value), name


@torch.no_grad()
def test_a_folder_computes_as_the_official_network(tmp_path):
    """Where our class reads it; diffusers' own has other time frequencies."""
    model = network()
    in_memory = to_diffusers(model, sample_size=8)
    in_memory.save_pretrained(tmp_path)
    expected = in_memory(noise(), **INPUTS).sample
    read = OfficialDiT.from_pretrained(tmp_path).eval()
    assert torch.equal(read(noise(), **INPUTS).sample, expected)
    plain = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert (plain(noise(), **INPUTS).sample - expected).abs().max() > 1e-4


def test_a_pipeline_keeps_the_class(tmp_path):
    """diffusers' DiTPipeline saves and reads it, and caches know it by the class that it extends."""
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    transformer = to_diffusers(network(), sample_size=8)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path)
    back = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(back.transformer) is OfficialDiT
    for each in (pipe, back):
        each.set_progress_bar_config(disable=True)
    assert torch.equal(generate(back, 2), generate(pipe, 2))
    assert len(cache(back).sites) == 4
    assert torch.equal(from_diffusers(back.transformer).blocks[1].attn.qkv.weight, transformer_qkv(transformer))


def transformer_qkv(transformer) -> torch.Tensor:
    attention = transformer.transformer_blocks[1].attn1
    return torch.cat([getattr(attention, f"to_{letter}").weight for letter in "qkv"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_timesteps": 500}, r"num_timesteps=500 \(only 1000\)"),
        ({"predicts": "velocity"}, r"predicts='velocity' \(only 'noise'\)"),
        ({"num_positions": 16}, r"num_positions=16 \(only 0\)"),
        ({"num_classes": 0}, r"num_classes=0 \(only models with classes\)"),
        ({"num_timesteps": 10, "predicts": "x0"}, r"num_timesteps=10 .*, predicts='x0'"),
    ],
)
def test_what_a_folder_cannot_hold(changes, named):
    with pytest.raises(ValueError, match=f"cannot hold {named}.*keep it as a folder of untwine"):
        to_diffusers(network(**changes))


def test_other_models_and_folders(tmp_path):
    with pytest.raises(ValueError, match="model must be a DiT, got a SiT"):
        to_diffusers(SiT(**SIZES))
    with pytest.raises(ValueError, match="must be a DiTTransformer2DModel, got DiT"):
        from_diffusers(network())
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="holds a UNet2DModel, not a DiTTransformer2DModel"):
        from_diffusers(tmp_path)
