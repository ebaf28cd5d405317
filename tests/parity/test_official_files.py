"""The files that official weights come in: prefixes, inference of the configuration, refusals, atomic output."""

from __future__ import annotations

import pickle
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from untwine.contracts import Condition
from untwine.integrations.official import convert, from_official, load_official_file
from untwine.models.ddt import DDT
from untwine.models.dit import ImprovedDiT

OFFICIAL = {"in_channels": 4, "num_groups": 2, "hidden_size": 16, "num_blocks": 3, "patch_size": 2, "num_classes": 6}
SPLIT = {**OFFICIAL, "num_encoder_blocks": 2}


def official_shapes(options: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official state dict, written out from the description of the format."""
    width, hidden = options["hidden_size"], int(2 * (4 * options["hidden_size"]) / 3)
    patch = options["in_channels"] * options["patch_size"] ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (options["num_classes"] + 1, width),
        "final_layer.linear.weight": (patch, width),
        "final_layer.linear.bias": (patch,),
        "final_layer.adaLN_modulation.0.weight": (2 * width, width),
        "final_layer.adaLN_modulation.0.bias": (2 * width,),
    }
    for embedder in ("x_embedder", "s_embedder")[: 1 + ("num_encoder_blocks" in options)]:
        shapes |= {f"{embedder}.proj.weight": (width, patch), f"{embedder}.proj.bias": (width,)}
    block = {
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.q_norm.weight": (width // options["num_groups"],),
        "attn.k_norm.weight": (width // options["num_groups"],),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.w1.weight": (hidden, width),
        "mlp.w2.weight": (width, hidden),
        "mlp.w3.weight": (hidden, width),
        "adaLN_modulation.0.weight": (6 * width, width),
        "adaLN_modulation.0.bias": (6 * width,),
    }
    return shapes | {f"blocks.{i}.{k}": v for i in range(options["num_blocks"]) for k, v in block.items()}


def official_weights(options: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.2 * torch.randn(shape, generator=generator) for k, shape in official_shapes(options).items()}


def sample(model) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * 4 * 4 * 6).view(2, 4, 4, 6)
    return model(x, torch.tensor([0.25, 0.5]), Condition(labels=torch.tensor([1, 5]))).sample


@pytest.fixture
def weights():
    return official_weights(SPLIT)


@pytest.fixture
def expected(weights):
    return sample(DDT.from_official(weights, SPLIT))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".safetensors"])
def test_formats(tmp_path, weights, expected, suffix):
    """Each format converts to a folder that loads to the same model; EMA weights win in a Lightning checkpoint."""
    source, out = tmp_path / f"official{suffix}", tmp_path / "new" / "model"
    if suffix == ".ckpt":
        raw = official_weights(SPLIT, seed=1)
        state = {f"denoiser.{k}": v for k, v in raw.items()} | {f"ema_denoiser.{k}": v for k, v in weights.items()}
        torch.save({"state_dict": state | {"diffusion_trainer.proj.0.weight": torch.zeros(2, 2)}, "epoch": 3}, source)
    elif suffix == ".safetensors":
        save_file(weights, source)
    else:
        torch.save(weights, source, _use_new_zipfile_serialization=suffix == ".pt")
    config = {"num_encoder_blocks": 2, "patch_size": 2}
    report = convert(source, "ddt", config, out)
    assert report.weights == ("ema_denoiser." if suffix == ".ckpt" else "")
    assert (report.network, report.config) == ("ddt", SPLIT)
    assert report.num_parameters == sum(v.numel() for v in weights.values())
    assert torch.equal(sample(DDT.from_pretrained(out)), expected)
    assert sorted(p.name for p in out.parent.iterdir()) == ["model"]


def test_compiled_and_raw_weights(tmp_path, weights, expected):
    source = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"denoiser._orig_mod.{k}": v for k, v in weights.items()}}, source)
    assert torch.equal(sample(from_official("ddt", load_official_file(source), SPLIT)), expected)


def test_network_is_recognised_and_config_read_off_the_weights():
    flat = official_weights(OFFICIAL)
    assert isinstance(from_official("ddt", flat, OFFICIAL), ImprovedDiT)
    assert ImprovedDiT.infer_official(flat, {"in_channels": 4}) == OFFICIAL
    with pytest.raises(ValueError, match="patch_size"):
        from_official("ddt", flat)
    with pytest.raises(ValueError, match=r"num_encoder_blocks.*give it in config"):
        DDT.infer_official(official_weights(SPLIT), {"patch_size": 2})
    with pytest.raises(ValueError, match="2 missing"):
        from_official("ddt", flat, SPLIT, network="ddt")
    with pytest.raises(ValueError, match="none of ddt's networks"):
        from_official("ddt", {"pos_embed": torch.zeros(1)}, OFFICIAL)


def test_published_size_needs_no_config():
    """The encoder depth, patch size and channels of a published size come with its width and depth."""
    options = {**SPLIT, "hidden_size": 768, "num_blocks": 12, "num_groups": 12, "num_encoder_blocks": 8}
    meta = {k: torch.empty(shape, device="meta") for k, shape in official_shapes(options).items()}
    assert DDT.infer_official(meta, {}) == options


def test_keys_that_do_not_fit(weights):
    weights["blocks.0.attn.qkv.wieght"] = weights.pop("blocks.0.attn.qkv.weight")
    weights["blocks.1.norm1.weight"] = torch.zeros(7)
    with pytest.raises(ValueError) as caught:
        DDT.from_official(weights, SPLIT)
    message = str(caught.value)
    assert "blocks.0.attn.qkv.weight (nearest: blocks.0.attn.qkv.wieght)" in message
    assert "1 unexpected:\n  blocks.0.attn.qkv.wieght" in message
    assert "blocks.1.norm1.weight: (7,), expected (16,)" in message


def test_many_missing_keys_are_cut(weights):
    kept = {k: v for k, v in weights.items() if not k.startswith("blocks.")}
    with pytest.raises(ValueError) as caught:
        DDT.from_official(kept, SPLIT)
    assert "36 missing:" in str(caught.value)
    assert str(caught.value).count("blocks.") == 20


def test_unknown_names(weights):
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        DDT.from_official(weights, {**SPLIT, "hiden_size": 16})
    assert DDT.from_official(weights, {**SPLIT, "learn_sigma": True}).config.hidden_size == 16
    with pytest.raises(ValueError, match="did you mean 'ddt'"):
        from_official("ddtt", weights, SPLIT)
    with pytest.raises(ValueError, match="did you mean 'improved_dit'"):
        from_official("ddt", weights, SPLIT, network="improved_dti")


def test_pickle_that_runs_code_is_refused(tmp_path, weights):
    source = tmp_path / "evil.ckpt"
    torch.save({"state_dict": weights, "hyper_parameters": Namespace(a=1)}, source)
    with pytest.raises(ValueError, match=r"argparse\.Namespace.*only plain weights") as caught:
        convert(source, "ddt", SPLIT, tmp_path / "out")
    assert "weights.pt" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_files(tmp_path, weights, suffix, damage):
    source = tmp_path / f"x{suffix}"
    (torch.save if suffix == ".ckpt" else save_file)(weights, source)
    data = source.read_bytes()
    source.write_bytes({"truncated": data[: len(data) // 2], "text": b"not a checkpoint\n", "empty": b""}[damage])
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load_official_file(source)


def test_files_without_weights(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        load_official_file(tmp_path / "absent.ckpt")
    source = tmp_path / "x.pt"
    torch.save([1, 2], source)
    with pytest.raises(ValueError, match="holds a list"):
        load_official_file(source)
    torch.save({"epoch": 1}, source)
    with pytest.raises(ValueError, match="no tensors"):
        load_official_file(source)


def test_output_is_atomic(tmp_path, weights, monkeypatch):
    """An existing folder is left alone, and a write that fails leaves nothing."""
    source, out = tmp_path / "x.pt", tmp_path / "out"
    torch.save(weights, source)

    def fail(self, folder, **_):
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(DDT, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            convert(source, "ddt", SPLIT, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]
    out.mkdir()
    with pytest.raises(ValueError, match="exists"):
        convert(source, "ddt", SPLIT, out)


def test_protocol_zero_pickles_are_no_checkpoints(tmp_path):
    source = tmp_path / "x.pth"
    source.write_bytes(pickle.dumps(Namespace(a=1), protocol=2))
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_official_file(source)
