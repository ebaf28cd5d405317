"""Every registered backbone keeps the contract, and what is particular to DDT and the improved DiT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from untwine.contracts import Condition
from untwine.models import MODELS
from untwine.models.layers.basic import RMSNorm
from untwine.models.layers.embeddings import patchify, unpatchify
from untwine.models.layers.rope import image_positions, rope_tables, rotate
from untwine.testing.backbones import CHECKS, DECOUPLED_CHECKS, DIFFUSERS_CHECKS, Subject, refusal

SMALL = {"in_channels": 3, "hidden_size": 32, "num_heads": 4, "num_classes": 5}
HEAD = {"depth": 5, "encoder_depth": 3, "decoder_hidden_size": 48, "decoder_num_heads": 3, "patch_size": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "ddt": {"depth": 5, "encoder_depth": 3},
    "improved_dit": {"depth": 3},
    "dit": {"depth": 3},
    "sit": {"depth": 3},
    "lightningdit": {"depth": 3, "patch_size": 2},
    "ddt_head": HEAD,
    "umd": {"depth": 3, "decoder_depth": 1},
}
# The same networks with their condition as tokens, normalised queries and keys, and the encoder's own prediction.
IN_CONTEXT: dict[str, dict[str, Any]] = {
    "lightningdit": {"conditioning": "tokens", "qk_norm": True, "num_positions": -1, "time_features": "fourier"},
    "ddt_head": {"conditioning": "tokens", "qk_norm": True, "num_positions": -1},
}


def subject(name: str, **overrides: Any) -> Subject:
    return Subject(lambda: MODELS[name](**{**SMALL, **OPTIONS.get(name, {}), **overrides}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("check", (*CHECKS, *DIFFUSERS_CHECKS), ids=lambda check: check.__name__)
def test_backbone(name, check):
    check(subject(name))


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].decoupled])
@pytest.mark.parametrize("check", DECOUPLED_CHECKS, ids=lambda check: check.__name__)
def test_decoupled_backbone(name, check):
    check(subject(name))


@pytest.mark.parametrize("name", IN_CONTEXT)
@pytest.mark.parametrize("check", (*CHECKS, *DECOUPLED_CHECKS), ids=lambda check: check.__name__)
def test_in_context_backbone(name, check):
    if check not in DECOUPLED_CHECKS or MODELS[name].decoupled:
        check(subject(name, **IN_CONTEXT[name]))


@pytest.mark.parametrize("name", MODELS)
def test_unconditional(name):
    model = subject(name, num_classes=0).model()
    x, t, _ = subject(name).inputs(model)
    assert model.accepts == frozenset()
    assert model(x, t, Condition()).sample.shape == x.shape
    assert model.null(Condition()) == Condition()
    assert "labels" in refusal(lambda: model(x, t, Condition(labels=torch.zeros(3, dtype=torch.long))))


@pytest.mark.parametrize("name", MODELS)
def test_null_is_the_last_row_of_the_table(name):
    model = subject(name).model()
    x, t, condition = subject(name).inputs(model)
    null = model.null(condition)
    assert null.labels.tolist() == [5, 5, 5]
    with torch.no_grad():
        model.label_embedder.table.weight[5] += 1
        changed = model(x, t, null).sample
        model.label_embedder.table.weight[5] -= 1
    assert not torch.equal(changed, model(x, t, null).sample)


@pytest.mark.parametrize("name", MODELS)
def test_time_per_token(name):
    model = subject(name).model()
    x, t, condition = subject(name).inputs(model)
    per_token = t[:, None].expand(-1, 6).clone()
    expected = model(x, t, condition).sample
    torch.testing.assert_close(model(x, per_token, condition).sample, expected, rtol=0, atol=1e-5)
    per_token[:, 0] *= 0.5
    assert not torch.allclose(model(x, per_token, condition).sample, expected, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_mask_of_as_many_rows_as_samples_is_not_a_padding_mask(name):
    model = subject(name).model()
    x, t, condition = subject(name).inputs(model, batch=6)  # 6 tokens as well
    mask = torch.eye(6, dtype=torch.bool).roll(1, 1) | torch.eye(6, dtype=torch.bool)
    together = model(x, t, condition, attention_mask=mask).sample
    alone = model(x[:1], t[:1], condition.select(slice(0, 1)), attention_mask=mask).sample
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together, model(x, t, condition).sample, atol=1e-4)
    per_sample = model(x, t, condition, attention_mask=mask.expand(6, 6, 6)).sample
    per_head = model(x, t, condition, attention_mask=mask.expand(6, 4, 6, 6)).sample
    torch.testing.assert_close(per_sample, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(per_head, together, rtol=0, atol=1e-6)
    assert "attention_mask" in refusal(lambda: model(x, t, condition, attention_mask=mask[:5]))


def test_masks_of_single_blocks():
    model = subject("improved_dit").model()
    x, t, condition = subject("improved_dit").inputs(model)
    mask = torch.eye(6, dtype=torch.bool)
    plain, first = model(x, t, condition).sample, model(x, t, condition, attention_mask=[mask]).sample
    assert torch.equal(plain, model(x, t, condition, attention_mask=[None, None]).sample)
    assert torch.equal(first, model(x, t, condition, attention_mask=[mask, None, None]).sample)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, model(x, t, condition, attention_mask=[None, mask]).sample)
    assert torch.equal(
        model(x, t, condition, attention_mask=[mask] * 3).sample, model(x, t, condition, attention_mask=mask).sample
    )
    assert "4 entries" in refusal(lambda: model(x, t, condition, attention_mask=[mask] * 4))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "shape, message",
    [((1, 3, 5, 6), "4 x 6"), ((1, 3, 4, 7), "4 x 8"), ((1, 2, 4, 4), "(B, 3, H, W)"), ((1, 3, 4), "(B, 3, H, W)")],
)
def test_bad_sample(name, shape, message):
    model = subject(name).model()
    assert message in refusal(lambda: model(torch.zeros(shape), torch.zeros(1), Condition(labels=torch.tensor([0]))))


@pytest.mark.parametrize("name", MODELS)
def test_bad_time_and_labels(name):
    model = subject(name).model()
    x, t, condition = subject(name).inputs(model)
    assert "(3,) or (3, 6)" in refusal(lambda: model(x, t[:2], condition))
    assert "condition.labels" in refusal(lambda: model(x, t, condition.select(slice(0, 2))))


@pytest.mark.parametrize(
    "override, message",
    [
        ({"hidden_size": 30}, "hidden_size must be a multiple of 4 * num_heads = 16"),
        ({"encoder_depth": 5}, "encoder_depth must be within [1, depth - 1 = 4], got 5"),
        ({"encoder_depth": 0}, "encoder_depth"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"num_classes": -1}, "num_classes"),
    ],
)
def test_bad_options(override, message):
    assert message in refusal(lambda: subject("ddt", **override).build())


@pytest.mark.parametrize(
    "name, size, count",
    [("ddt", "B", 130_262_800), ("ddt", "L", 457_648_144), ("ddt", "XL", 674_646_352)],
)
def test_published_sizes(name, size, count):
    """Parameter counts of the published models, counted from the official code."""
    with torch.device("meta"):
        model = MODELS[name].from_size(size)
        smaller = MODELS[name].from_size(size, num_classes=0)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in smaller.parameters()) == count - 1001 * model.config.hidden_size
    assert "did you mean 'XL'" in refusal(lambda: MODELS[name].from_size("XLL"))


def test_initialisation():
    """Xavier patch layers without bias, deviation 0.02 for labels and time, zero head, default elsewhere."""
    torch.manual_seed(0)
    model = subject("ddt", hidden_size=128, num_classes=200).build()
    for embedder in (model.encoder_embedder, model.decoder_embedder):
        bound = (6 / sum(embedder.proj.weight.shape)) ** 0.5
        assert 0.9 * bound < embedder.proj.weight.abs().max() <= bound
        assert embedder.proj.bias.abs().max() == 0
    for weight in (
        model.label_embedder.table.weight,
        model.time_embedder.mlp[0].weight,
        model.time_embedder.mlp[2].weight,
    ):
        assert abs(weight.std() - 0.02) < 0.001
    assert not any(p.abs().max() for p in model.final_layer.parameters())
    bound = 128**-0.5
    for block in model.blocks:
        assert 0.9 * bound < block.adaln.weight.abs().max() <= bound
        assert block.adaln.bias.abs().max() > 0


def test_features_travel_with_the_state():
    model = subject("ddt").model()
    x, t, condition = subject("ddt").inputs(model)
    out = model(x, t, condition, features=("blocks.1", "blocks.4"))
    state = model.encode(x, t, condition, features=("blocks.1",))
    again = model(x, t, condition, state=state, features=("blocks.1", "blocks.4"))
    assert set(again.features) == {"blocks.1", "blocks.4"}
    assert all(torch.equal(out.features[k], again.features[k]) for k in out.features)
    bare = model.encode(x, t, condition)
    assert "blocks.1" in refusal(lambda: model(x, t, condition, state=bare, features=("blocks.1",)))
    assert "blocks.4" in refusal(lambda: model.encode(x, t, condition, features=("blocks.4",)))
    assert "blocks.1" in refusal(lambda: model.decode(x, bare, features=("blocks.1",)))


def test_caches_that_assume_one_stream_are_refused():
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    model = subject("ddt").build()
    assert "MagCache" in refusal(
        lambda: model.enable_cache(MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4))
    )
    assert not model.is_cache_enabled
    shallow = subject("ddt", depth=2, encoder_depth=1).build()
    assert "two blocks" in refusal(lambda: shallow.enable_cache(FirstBlockCacheConfig()))


def test_patchify_is_unfold():
    x = torch.randn(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert torch.equal(tokens, F.unfold(x, 2, stride=2).transpose(1, 2))
    assert torch.equal(unpatchify(tokens, 2, (4, 6)), x)


def test_rope_depends_on_relative_position_alone():
    """The product of a rotated query and key is unchanged when both move; the tables stay float32 islands."""
    q, k = torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16)
    positions = image_positions(2, 3)
    assert positions[0].tolist() == [[0, 0], [8, 0], [16, 0], [0, 16], [8, 16], [16, 16]]

    def products(shift):
        rope = rope_tables(positions + torch.tensor(shift), 16)
        assert all(table.dtype == torch.float32 for table in rope)
        return torch.einsum("bnhd,bmhd->bhnm", rotate(q, rope), rotate(k, rope))

    torch.testing.assert_close(products([3.0, -5.0]), products([0.0, 0.0]), rtol=0, atol=1e-4)
    assert not torch.allclose(products([0.0, 0.0]), torch.einsum("bnhd,bmhd->bhnm", q, k), atol=1e-2)
    assert "divisible by 4" in refusal(lambda: rope_tables(positions, 6))


def test_rope_rotates_in_float32():
    rope = rope_tables(image_positions(4, 4), 16)
    x = torch.randn(1, 16, 2, 16).bfloat16()
    assert torch.equal(rotate(x, rope), rotate(x.float(), rope).bfloat16())


@pytest.mark.parametrize("last", [False, True])
def test_rms_norm_rounding_order(last):
    """Statistics in float32; the weight multiplies after (DDT) or before (improved DiT) the result is rounded."""
    norm = RMSNorm(64, scale_in_float32=last)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    norm.to(torch.bfloat16)
    x = (10 * torch.randn(512, 64)).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    orders = {False: normed.bfloat16() * norm.weight, True: (normed * norm.weight.float()).bfloat16()}
    assert torch.equal(norm(x), orders[last])
    assert not torch.equal(norm(x), orders[not last])
