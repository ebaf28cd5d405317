"""DiT, SiT, LightningDiT and the DDT heads beyond the contract: exactness of time, states, sizes, files, refusals."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import untwine
from tests.tiny import tiny
from untwine.contracts import Condition, Tokens
from untwine.diffusion.guidance import Branch, Guided, classifier_free
from untwine.diffusion.paths import DiscretePath, LinearPath
from untwine.diffusion.sampling import StepInfo
from untwine.integrations.official import convert, load_official_file
from untwine.models import MODELS
from untwine.models.ddt_head import DDTHead
from untwine.models.dit import DiT
from untwine.models.layers.embeddings import sincos_positions
from untwine.models.lightningdit import LightningDiT
from untwine.models.sit import SiT
from untwine.testing.backbones import Subject, refusal
from untwine.training.trainer import Trainer

WIDTHS = {"hidden_size": 48, "num_heads": 4, "num_classes": 5}
HEAD = {"depth": 5, "encoder_depth": 3, "decoder_hidden_size": 64, "decoder_num_heads": 4}
TOKENS = {"conditioning": "tokens", "qk_norm": True, "num_positions": -1, "time_features": "fourier"}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("dit", {"depth": 3}),
    "dit without variance": ("dit", {"depth": 3, "learn_sigma": False}),
    "sit": ("sit", {"depth": 3}),
    "lightningdit": ("lightningdit", {"depth": 3}),
    "lightningdit in context": ("lightningdit", {"depth": 3, "mlp": "gelu", **TOKENS}),
    "head": ("ddt_head", HEAD),
    "head of equal width": ("ddt_head", {**HEAD, "decoder_hidden_size": 48}),
    "head in context": ("ddt_head", {**HEAD, **TOKENS}),
    "head with everything": ("ddt_head", {**HEAD, **TOKENS, "base_depth": 2, "second_time": True}),
    "head with class token": ("ddt_head", {**HEAD, **TOKENS, "base_depth": 2, "class_token_dim": 7}),
}


def conditions(model: Any, batch: int) -> Condition:
    vectors = {"r": torch.linspace(0, 0.1, batch)[:, None, None]} if "vectors.r" in model.accepts else {}
    return Condition(labels=torch.arange(batch) % 5, vectors=vectors)


def subject(name: str, **options: Any) -> Subject:
    network, own = NETWORKS[name]
    sizes = {"in_channels": 3, "patch_size": 2, **WIDTHS, **own, **options}
    return Subject(lambda: MODELS[network](**sizes), condition=conditions)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape, patch_size", [((3, 8, 8), 2), ((1, 12, 8), 4)])
def test_flops_are_those_that_torch_counts(name, shape, patch_size):
    model = subject(name, in_channels=shape[0], patch_size=patch_size).build()
    if model.config.get("class_token_dim"):
        shape = (1, model.packing(8).length)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, *shape), torch.ones(2), conditions(model, 2))
    assert 2 * model.flops(shape) == counter.get_total_flops()


@pytest.mark.parametrize(
    "name, size, options, millions",
    [
        ("dit", "S", {}, 32.87),
        ("dit", "B", {}, 130.32),
        ("dit", "L", {}, 457.84),
        ("dit", "XL", {}, 674.83),
        ("ddt_head", "XL", {}, 838),  # with its frozen table of 256 positions 839, as published
        ("ddt_head", "XL", {"num_positions": -1, "qk_norm": True, "conditioning": "tokens"}, 615.3),
        ("ddt_head", "XL", {"in_channels": 4, "patch_size": 2, "qk_norm": True, "conditioning": "tokens"}, 611.3),
    ],
)
def test_published_sizes(name, size, options, millions):
    """Parameters of the published models, rounded as their papers do."""
    with torch.device("meta"):
        model = MODELS[name].from_size(size, **options)
    digits = len(str(millions).partition(".")[2])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5 * 10**-digits)


# Time


def test_every_level_is_recovered_exactly():
    model = subject("dit").build()
    seen: list[torch.Tensor] = []
    model.time_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.arange(1, 1001) / 1000
    model._embed_time(t)
    assert torch.equal(seen[0], torch.arange(1000.0))
    assert torch.equal(seen[0], DiscretePath().levels(t).float())


@pytest.mark.parametrize("name", ["head", "lightningdit in context"])
def test_fourier_frequencies_stay_float32(name, tmp_path):
    model = subject(name).model()
    model.time_embedder.frequencies.normal_()  # as if they came with official weights
    expected = model.time_embedder.frequencies.clone()
    half = model.to(torch.bfloat16)
    assert half.time_embedder.frequencies.dtype == torch.float32
    assert torch.equal(half.time_embedder.frequencies, expected)
    half.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(loaded.time_embedder.frequencies, expected)
    assert loaded.blocks[0].attn.qkv.weight.dtype == torch.bfloat16


def test_two_times_enter_as_their_difference_and_the_first():
    """With the length of the step fixed, t still matters; the null keeps r; a state cannot be given another time."""
    model = subject("head with everything").model()
    x, t, condition = subject("head with everything").inputs(model)
    out = model(x, t, condition).sample
    later = replace(condition, vectors={"r": condition.vectors["r"] + 0.1})
    assert not torch.equal(model(x, t + 0.1, later).sample, out)
    null = model.null(condition)
    assert null.labels.tolist() == [5] * 3
    assert torch.equal(null.vectors["r"], condition.vectors["r"])
    state = model.encode(x, t, condition)
    assert "second_time" in refusal(lambda: model.decode(x, state, retime=t))


# States of the heads


@pytest.mark.parametrize("name", ["head", "head in context", "head of equal width"])
def test_modulations_are_affine_in_the_tokens_of_the_state(name):
    """What forecasts rely on beyond their memory budget; it does not hold for the hidden tokens before the SiLU."""
    model = subject(name).model()
    x, t, condition = subject(name).inputs(model)
    a, b = model.encode(x, t, condition), model.encode(0.3 * x, 0.5 * t, condition)
    mixed = model.modulate(replace(a, tokens=1.7 * a.tokens - 0.7 * b.tokens)).modulations
    apart = zip(model.modulate(a).modulations, model.modulate(b).modulations)
    for got, (from_a, from_b) in zip(mixed, apart):
        torch.testing.assert_close(got, 1.7 * from_a - 0.7 * from_b, rtol=0, atol=1e-4)


def test_forecasts_do_not_depend_on_the_memory_budget():
    model = subject("head").model()
    x, _, condition = subject("head").inputs(model)
    results = []
    for budget in (2**30, 0):
        branches = {"cond": Branch(model, condition), "null": Branch(model, model.null(condition))}
        denoise = Guided(branches, classifier_free(2.0), path=LinearPath(), order=1, modulation_budget=budget)
        for step, refresh in enumerate((True, True, False)):
            t = 0.9 - 0.2 * step
            ahead = ((step, 0, t), *(((2, 0, 0.5),) if step == 1 else ()))
            with torch.no_grad():
                value = denoise(x, torch.tensor(t), StepInfo(step, 0, 3, refresh, ahead)).value
        results.append(value)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)


def test_the_base_prediction_travels_with_the_state_and_not_as_a_feature():
    model = subject("head with everything").model()
    x, t, condition = subject("head with everything").inputs(model)
    out = model(x, t, condition, features=["blocks.0"])
    assert set(out.features) == {"blocks.0"}
    state = model.encode(x, t, condition)
    assert torch.equal(model.decode(0.5 * x, state).extra["base"], out.extra["base"])
    assert out.extra["base"].shape == x.shape
    assert not torch.equal(out.extra["base"], out.sample)


def test_image_and_class_token_are_one_sample():
    """Each part reaches the other; gradients reach all; the base leaves the token as the full prediction has it."""
    chosen = subject("head with class token")
    model = chosen.build()
    packing = model.packing(4)
    x, t, condition = torch.randn(3, 1, packing.length), torch.rand(3), conditions(model, 3)
    assert model(x, t, condition).sample.abs().max() == 0
    model = chosen.model()
    out = model(x, t, condition)
    parts, base = packing.unpack(out.sample), packing.unpack(out.extra["base"])
    assert {name: part.shape for name, part in parts.items()} == {"image": (3, 3, 4, 4), "token": (3, 7)}
    assert torch.equal(packing.pack(parts), out.sample)
    assert torch.equal(parts["token"], base["token"])
    assert not torch.equal(parts["image"], base["image"])
    given = packing.unpack(x)
    for name in ("image", "token"):
        changed = packing.unpack(model(packing.pack({**given, name: given[name] + 0.5}), t, condition).sample)
        assert not any(torch.equal(changed[k], parts[k]) for k in parts)
    state = model.encode(x, t, condition)
    assert torch.equal(model.decode(x, model.modulate(state)).sample, out.sample)
    (out.sample.square().mean() + out.extra["base"].square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    times = packing.expand({"image": torch.zeros(3), "token": torch.ones(3)})
    assert times.sum().item() == 3 * 7
    assert "x must be (B, 1, " in refusal(lambda: model(x[..., :-1], t, condition))
    assert "needs conditioning='tokens'" in refusal(lambda: subject("head", class_token_dim=7).build())


# Text


def test_padding_of_a_text_changes_nothing():
    options = {"num_classes": 0, "text_dim": 12}
    model = subject("head in context", **options).model()
    assert model.accepts == {"tokens.text"}
    x, t, _ = subject("head in context").inputs(model)
    text = torch.randn(3, 6, 12)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 6])
    out = model(x, t, Condition(tokens={"text": Tokens(text, mask)})).sample
    other = torch.where(mask[..., None], text, 9.0)
    torch.testing.assert_close(model(x, t, Condition(tokens={"text": Tokens(other, mask)})).sample, out)
    alone = model(x[1:2], t[1:2], Condition(tokens={"text": Tokens(text[1:2, :4])})).sample
    torch.testing.assert_close(alone, out[1:2], rtol=0, atol=1e-5)
    assert not torch.allclose(model(x, t, Condition(tokens={"text": Tokens(other)})).sample[1], out[1], atol=1e-4)
    assert "no null" in refusal(lambda: model.null(Condition(tokens={"text": Tokens(text)}), ["vectors.r"]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conditioning": "cross"}, "conditioning must be 'adaln' or 'tokens', got 'cross'"),
        ({"text_dim": 8}, "need conditioning='tokens'"),
        ({"conditioning": "tokens", "text_dim": 8}, "num_classes must be 0 for a model of text"),
        ({"base_depth": 4}, "base_depth must be within [0, encoder_depth = 3], got 4"),
        ({"decoder_hidden_size": 60}, "decoder_hidden_size must be a multiple of 4 * decoder_num_heads = 16"),
    ],
)
def test_bad_options_of_a_head(options, message):
    assert message in refusal(lambda: subject("head", **options).build())


# Official weights

VIT = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}
VIT |= {"num_classes": 6}


def vit_shapes(width: int = 16, depth: int = 2, channels: int = 3, patch: int = 2) -> dict[str, tuple[int, ...]]:
    """DiT's layout, from the description of the format."""
    block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "adaLN_modulation.1": (6 * width, width)}
    block |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    layers = {"x_embedder.proj": (width, channels, patch, patch), "t_embedder.mlp.0": (width, 256)}
    layers |= {"t_embedder.mlp.2": (width, width), "final_layer.linear": (2 * channels * patch**2, width)}
    layers |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    layers |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return {**shapes, "y_embedder.embedding_table.weight": (7, width), "pos_embed": (1, 4, width)}


def randomised(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def vit():
    return {**randomised(vit_shapes()), "pos_embed": sincos_positions(2, 2, 16)}


def test_computed_positions_take_any_grid_and_a_stored_table_one(vit, tmp_path):
    labels = Condition(labels=torch.tensor([1]))
    model = untwine.from_official("dit", vit, VIT)
    assert model(torch.zeros(1, 3, 6, 8), torch.ones(1), labels).sample.shape == (1, 3, 6, 8)
    own = untwine.from_official("dit", {**vit, "pos_embed": torch.randn(1, 4, 16)}, VIT)
    assert (own.square_only, own.max_tokens, model.square_only) == (True, 4, False)
    x = torch.randn(1, 3, 4, 4)
    out = own(x, torch.ones(1), labels).sample
    assert not torch.equal(out, model(x, torch.ones(1), labels).sample)
    own.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert torch.equal(loaded.position_embedder.table, own.position_embedder.table)
    torch.testing.assert_close(loaded(x, torch.ones(1), labels).sample, out, rtol=0, atol=1e-4)
    for size in ((4, 8), (8, 8)):
        message = refusal(lambda size=size: own(torch.zeros(1, 3, *size), torch.ones(1), labels))
        assert "x must be 4 x 4" in message
    with pytest.raises(ValueError, match="no square grid"):
        untwine.from_official("dit", {**vit, "pos_embed": torch.zeros(1, 5, 16)}, VIT)


def test_variance_rows_are_kept_or_dropped_exactly(vit):
    """SiT's velocity is minus the first half of what DiT's network would put out."""
    x, labels = torch.randn(2, 3, 4, 4), Condition(labels=torch.tensor([1, 6]))
    dit, sit = (untwine.from_official(slug, vit, VIT) for slug in ("dit", "sit"))
    assert sit.final_layer.linear.out_features * 2 == dit.final_layer.linear.out_features
    assert torch.equal(sit.final_layer.linear.weight, -dit.final_layer.linear.weight[:12])
    out = dit(x, torch.tensor([0.001, 0.001]), labels)  # level 0: all sines 0, as SiT at our t = 1
    torch.testing.assert_close(sit(x, torch.ones(2), labels).sample, -out.sample, rtol=0, atol=1e-6)
    assert out.extra["variance"].shape == x.shape


def test_config_is_read_off_the_weights(vit):
    with pytest.raises(ValueError, match=r"num_heads is not in the weights.*give it in config"):
        untwine.from_official("dit", vit)
    read = DiT.infer_official(vit, {"num_heads": 2})
    assert read == {**{k: v for k, v in VIT.items() if k != "input_size"}, "learn_sigma": True}
    size = {k: torch.empty(v, device="meta") for k, v in vit_shapes(1152, 28, 4).items()}
    assert DiT.infer_official(size, {})["num_heads"] == 16


def test_checkpoints_of_other_systems_are_named(vit):
    def told(slug: str, weights: dict[str, torch.Tensor]) -> str:
        return refusal(lambda: untwine.from_official(slug, weights, {}))

    assert "looks like weights of dit or sit." in told("ddt", vit)
    assert "looks like weights of dit or sit" in told("rae", vit)
    repa = {**vit, "projectors.0.0.weight": torch.zeros(2, 2)}
    assert "looks like weights of repa." in told("dit", repa)
    assert "looks like weights of dit or sit." in told("repa", vit)
    lightning = {**vit, "feat_rope.freqs_cos": torch.zeros(4, 8)}
    assert "looks like weights of lightningdit." in told("dit", lightning)
    rae = {**vit, "s_embedder.proj.weight": torch.zeros(1), "t_embedder.W": torch.zeros(1)}
    assert "looks like weights of rae." in told("dit", rae)
    assert "DDTHead has no official weights of dit" in refusal(lambda: DDTHead.from_official(rae, {}, system="dit"))
    assert "it begins with ['unet.conv']" in told("dit", {"unet.conv": torch.zeros(1)})
    assert "did you mean 'sit'" in told("sitt", vit)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 32}, "x_embedder.proj.weight: (16, 12), expected (32, 12)"),
        ({"depth": 3}, "10 missing:\n  blocks.2.attn.qkv.weight"),
        ({"num_classes": 5}, "y_embedder.embedding_table.weight: (7, 16), expected (6, 16)"),
        ({"patch_size": 4}, "final_layer.linear.weight"),
        ({"learn_sigma": False, "in_channels": 6}, "x_embedder.proj.weight"),
        ({"hiden_size": 16}, "did you mean 'hidden_size'"),
    ],
)
def test_a_config_that_contradicts_the_weights(vit, change, message):
    assert message in refusal(lambda: untwine.from_official("dit", vit, {**VIT, **change}))


def test_pickles_with_code_are_refused(tmp_path, vit):
    torch.save({"ema": vit, "args": Namespace(model="DiT-S/2")}, tmp_path / "train.pt")
    with pytest.raises(ValueError, match=r"argparse\.Namespace, which unpickling would run"):
        load_official_file(tmp_path / "train.pt")


def test_a_converted_dit_samples_as_its_authors_do(tmp_path, vit):
    """From a training checkpoint's averaged weights to latents by the ancestral sampler with the learned variance."""
    from untwine.cli import main

    torch.save({"model": randomised(vit_shapes()), "ema": vit, "opt": {}}, tmp_path / "dit.pt")
    words = ["--config", "num_heads=2", "--latent-size", "4", "4"]
    out = tmp_path / "dit"
    assert main(["convert", str(tmp_path / "dit.pt"), "--system", "dit", "--out", str(out), *words]) == 0
    pipe = untwine.load(out)
    assert isinstance(pipe.model, DiT)
    assert (pipe.path, pipe.sampling.solver.variance) == (DiscretePath(), "learned")
    latents = pipe([1, 2], num_inference_steps=3, output_type="latent").images
    assert latents.shape == (2, 3, 4, 4)
    assert torch.as_tensor(latents).isfinite().all()
    report = convert(tmp_path / "dit.pt", "sit", {"num_heads": 2}, tmp_path / "sit")
    assert (report.slug, report.network) == ("sit", "sit")
    assert isinstance(untwine.load(tmp_path / "sit").model, SiT)


# The official LightningDiT of hustvl, for which no reference case is published: the network as its paper and the
# layout of its checkpoints describe it, in its own time (0 = noise) and on its own parameter names.

LIGHTNING = {"patch_size": 1, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 6}


def lightning_weights(*, wo_shift: bool, qk_norm: bool) -> dict[str, torch.Tensor]:
    width, hidden = 16, 42
    shapes = {k: v for k, v in vit_shapes(patch=1).items() if ".mlp.fc" not in k and "final_layer.linear" not in k}
    shapes |= {
        "final_layer.linear.weight": (3, width),
        "final_layer.linear.bias": (3,),
        "final_layer.norm_final.weight": (width,),
    }
    for i in range(2):
        block = {"norm1.weight": (width,), "norm2.weight": (width,), "mlp.w12.weight": (2 * hidden, width)}
        block |= {"mlp.w12.bias": (2 * hidden,), "mlp.w3.weight": (width, hidden), "mlp.w3.bias": (width,)}
        if qk_norm:
            block |= {"attn.q_norm.weight": (8,), "attn.k_norm.weight": (8,)}
        if wo_shift:
            block |= {"adaLN_modulation.1.weight": (4 * width, width), "adaLN_modulation.1.bias": (4 * width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    tables = torch.zeros(2, 4, 8)
    return {
        **randomised(shapes),
        "pos_embed": sincos_positions(2, 2, width),
        "feat_rope.freqs_cos": tables[0],
        "feat_rope.freqs_sin": tables[1],
    }


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def turned(x: torch.Tensor) -> torch.Tensor:
    """Heads of width 8 on a 2 x 2 grid: two pairs by the row, then two by the column, as complex numbers."""
    angle = torch.tensor([[[r, r / 100, c, c / 100] for c in (0.0, 1.0)] for r in (0.0, 1.0)]).flatten(0, 1)
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def lightning_reference(w: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])

    frequencies = 10000 ** (-torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    time = linear("t_embedder.mlp.0", torch.cat((angles.cos(), angles.sin()), 1))
    c = F.silu(linear("t_embedder.mlp.2", F.silu(time)) + w["y_embedder.embedding_table.weight"][y])[:, None]
    h = linear("x_embedder.proj", x.flatten(2).mT) + w["pos_embed"]
    for i in range(2):
        block = f"blocks.{i}"
        given = linear(f"{block}.adaLN_modulation.1", c)
        if given.shape[-1] == 64:
            scale_a, gate_a, scale_m, gate_m = given.chunk(4, -1)
            shift_a = shift_m = torch.zeros(())
        else:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = given.chunk(6, -1)
        a = linear(f"{block}.attn.qkv", rms(h, w[f"{block}.norm1.weight"]) * (1 + scale_a) + shift_a)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in a.chunk(3, -1))
        if f"{block}.attn.q_norm.weight" in w:
            q, k = (rms(value, w[f"{block}.attn.{n}_norm.weight"]) for n, value in (("q", q), ("k", k)))
        mixed = (turned(q) @ turned(k).mT * 8**-0.5).softmax(-1) @ v
        h = h + gate_a * linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        m = rms(h, w[f"{block}.norm2.weight"]) * (1 + scale_m) + shift_m
        gate, value = linear(f"{block}.mlp.w12", m).chunk(2, -1)
        h = h + gate_m * linear(f"{block}.mlp.w3", F.silu(gate) * value)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    out = linear("final_layer.linear", rms(h, w["final_layer.norm_final.weight"]) * (1 + scale) + shift)
    return out.mT.unflatten(2, (2, 2))


@pytest.mark.parametrize("wo_shift, qk_norm", [(False, False), (True, False), (False, True)])
def test_lightningdit_of_hustvl(wo_shift, qk_norm):
    weights = lightning_weights(wo_shift=wo_shift, qk_norm=qk_norm)
    model = untwine.from_official("lightningdit", weights)
    assert isinstance(model, LightningDiT)
    assert LightningDiT.infer_official(weights, {}) == {
        **LIGHTNING,
        "use_qknorm": qk_norm,
        "use_swiglu": True,
        "use_rope": True,
        "use_rmsnorm": True,
    }
    x, t, y = torch.randn(2, 3, 2, 2), torch.tensor([0.2, 0.75]), torch.tensor([1, 6])
    expected = -lightning_reference(weights, x, 1 - t, y)
    torch.testing.assert_close(model(x, t, Condition(labels=y)).sample, expected, rtol=0, atol=1e-5)
    explicit = untwine.from_official(
        "lightningdit", weights, {**LIGHTNING, "use_qknorm": qk_norm, "wo_shift": wo_shift}
    )
    assert torch.equal(explicit(x, t, Condition(labels=y)).sample, model(x, t, Condition(labels=y)).sample)


def test_depths_of_a_head_of_one_width_must_be_given():
    weights = {f"blocks.{i}.attn.proj.bias": torch.zeros(8) for i in range(4)}
    weights |= {"s_embedder.proj.weight": torch.zeros(8, 2, 1, 1), "x_embedder.proj.weight": torch.zeros(8, 2, 1, 1)}
    weights |= {"t_embedder.W": torch.zeros(4), "y_embedder.embedding_table.weight": torch.zeros(3, 8)}
    weights |= {f"{part}_feat_rope.freqs_cos": torch.zeros(4, 4) for part in ("enc", "dec")}
    with pytest.raises(ValueError, match=r"depth is not in the weights.*\[encoder, head\]"):
        DDTHead.infer_official(weights, {})
    assert DDTHead.infer_official(weights, {"depth": [3, 1]})["num_heads"] == [2, 2]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "head with class token"])
def test_every_site_runs_once_in_a_forward_pass(name):
    """What attaches to a site hooks its module, so the network must call the module and not reach around it."""
    model = subject(name).model()
    calls: dict[str, int] = dict.fromkeys(model.sites(), 0)

    def count(site: str) -> None:
        calls[site] += 1

    for site in calls:
        model.get_submodule(site).register_forward_hook(lambda *_, site=site: count(site))
    model(*subject(name).inputs(model))
    assert set(calls.values()) == {1}, calls


def test_what_is_no_parameter_outlives_fine_tuning_and_export(tmp_path):
    """The frequencies of converted weights are theirs, read from a run's average or as the start of another."""
    kind = {"kind": "ddt_head", "hidden_size": 32, "depth": 3, "encoder_depth": 2, "num_heads": 2, "patch_size": 2}
    recipe = tiny(model={**kind, "decoder_hidden_size": 32, "decoder_num_heads": 2}, **{"train.num_steps": 1})
    start = Trainer(recipe, tmp_path / "none").networks.model.state_dict()
    start["time_embedder.frequencies"] = start["time_embedder.frequencies"] + 1
    Trainer(recipe, tmp_path / "first", init=start).fit()
    Trainer(recipe, tmp_path / "second", init=tmp_path / "first").fit()
    for run in ("first", "second"):
        for weights in ("raw", "ema:0"):
            model = untwine.load(str(tmp_path / run), weights=weights).model
            assert torch.equal(model.time_embedder.frequencies, start["time_embedder.frequencies"]), (run, weights)
