"""Adapters attach, train, save, load, scale, fuse and detach without a trace."""

from __future__ import annotations

import pytest
import torch

from untwine.adapters.lora import LoRA, load_lora
from untwine.contracts import Condition
from untwine.diffusion.draws import Draws
from untwine.models.ddt import DDT
from untwine.models.dit import ImprovedDiT


@pytest.fixture(params=["ddt", "improved_dit"])
def model(request):
    torch.manual_seed(0)
    split = {"encoder_depth": 2} if request.param == "ddt" else {}
    kind = DDT if request.param == "ddt" else ImprovedDiT
    made = kind(in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=4, **split)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made


def run(model):
    x = Draws(0).normal("x", (1, 8, 8), range(3))
    with torch.no_grad():
        return model(x, torch.tensor([0.1, 0.5, 0.9]), Condition(labels=torch.tensor([0, 1, 2]))).sample


def disturb(attached):
    with torch.no_grad():
        for k, (_, value) in enumerate(sorted(attached.tensors().items())):
            value.copy_(0.1 * Draws(k).normal("w", tuple(value.shape), [0])[0])


def test_fresh_adapter_changes_nothing_and_detaches(model):
    before, state = run(model), {k: v.clone() for k, v in model.state_dict().items()}
    with LoRA(rank=4).attach(model) as attached:
        assert torch.equal(run(model), before)
        assert {k for k, p in model.named_parameters() if p.requires_grad} == {
            k for k, _ in model.named_parameters() if "lora_" in k
        }
        assert attached.report()["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert len(attached.report()["layers"]) == 3 * 5
        disturb(attached)
        assert not torch.allclose(run(model), before, atol=1e-3)
        attached.reset()
        assert torch.equal(run(model), before)
        disturb(attached)
    assert torch.equal(run(model), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in state)
    assert all(p.requires_grad for p in model.parameters())


def test_save_load_and_peft_reads_it(model, tmp_path):
    attached = LoRA(rank=4, alpha=8.0, targets=("attn.qkv",)).attach(model)
    disturb(attached)
    expected = run(model)
    attached.save(tmp_path / "adapter")
    attached.detach()
    with load_lora(model, tmp_path / "adapter"):
        assert torch.equal(run(model), expected)
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    assert torch.allclose(run(wrapped), expected, atol=1e-6)


def test_scale_and_fuse(model):
    before = run(model)
    with LoRA(rank=2).attach(model) as attached:
        disturb(attached)
        full = run(model)
        attached.fuse()
        assert torch.allclose(run(model), full, atol=1e-5)
        with pytest.raises(ValueError, match="fused"):
            attached.set_scale(0.5)
        attached.unfuse()
        attached.set_scale(0.0)
        assert torch.equal(run(model), before)
        attached.set_scale(1.0)
        assert torch.allclose(run(model), full, atol=1e-6)
        attached.fuse()
    assert torch.allclose(run(model), before, atol=1e-5)


def test_two_adapters_add_up(model):
    one, two = LoRA(rank=2, name="one").attach(model), LoRA(rank=2, name="two", targets=("mlp.w2",)).attach(model)
    disturb(two)
    both = run(model)
    two.detach()
    assert not torch.equal(run(model), both)
    one.detach()
    assert not any("lora" in key for key in model.state_dict())


def test_misfits_are_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"match no linear layer .* it has .*attn.qkv"):
        LoRA(targets=("attention.query",)).attach(model)
    with pytest.raises(ValueError, match="rank must be >= 1"):
        LoRA(rank=0)
    attached = LoRA(rank=2).attach(model)
    with pytest.raises(ValueError, match="attached already"):
        LoRA(rank=2).attach(model)
    attached.save(tmp_path)
    attached.detach()
    with pytest.raises(ValueError, match="holds no adapter_config"):
        load_lora(model, tmp_path / "nothing")
    other = DDT(in_channels=1, hidden_size=48, depth=3, encoder_depth=2, num_heads=2, num_classes=4)
    with pytest.raises(ValueError, match="does not fit this model"):
        load_lora(other, tmp_path)
    assert not any("lora" in key for key in other.state_dict())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        load_lora(model, tmp_path)
