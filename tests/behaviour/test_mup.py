"""muP: the roles of parameters, rates that hold over widths, and that a trained model is a plain one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny
from untwine.cli import main
from untwine.contracts import Condition
from untwine.models import MODELS
from untwine.pipelines.loading import load
from untwine.training import widths
from untwine.training.optim import AdamW, Factors, Muon
from untwine.training.parametrization import MuP, resized
from untwine.training.trainer import Trainer
from untwine.training.widths import at_width, coordinate_check, learning_rates, parametrized, with_rate

SIZE = {"in_channels": 3, "hidden_size": 64, "depth": 3, "num_heads": 4, "patch_size": 2, "num_classes": 5}
OPTIONS = {
    "ddt": {"encoder_depth": 2},
    "ddt_head": {"encoder_depth": 2, "decoder_hidden_size": 128, "decoder_num_heads": 4, "base_depth": 1},
}
IN_CONTEXT = {"conditioning": "tokens", "num_time_tokens": 2, "num_label_tokens": 2, "second_time": True}


def model_of(kind, **options):
    torch.manual_seed(0)
    return MODELS[kind](**{**SIZE, **OPTIONS.get(kind, {}), **options})


def every_model():
    yield from ((kind, {}) for kind in MODELS)
    yield from (("lightningdit", IN_CONTEXT), ("ddt_head", {**IN_CONTEXT, "class_token_dim": 6}))


@pytest.mark.parametrize(("kind", "options"), every_model(), ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_roles_follow_from_names_that_we_know(kind, options):
    """Against a table by hand, for every registered backbone."""
    mup = MuP(base_width=16, zero_modulations=False)
    model = mup.initialised(model_of(kind, **options))
    rows = mup.table(model)
    assert rows.keys() == dict(model.named_parameters()).keys()
    for name, row in rows.items():
        is_last = name.startswith(("final_layer.linear", "base_layer.linear", "class_layer"))
        if is_last:
            assert row.kind == ("output" if name.endswith("weight") else "fixed"), name
        elif "embedder" in name and name.endswith(("proj.weight", "mlp.0.weight", "embedder.0.weight")):
            assert row.kind == "input", name
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            assert row.kind == "fixed", name
        elif len(row.shape) == 1 or name.endswith(("table.weight", "tokens")):
            assert row.kind == "vector", name
        else:
            assert row.kind == "hidden", name
            assert row.factors.lr == pytest.approx(1 / row.ratio)
            assert row.ratio == pytest.approx(4, rel=0.05)  # SwiGLU's width is rounded
    weights = dict(model.named_parameters())
    for name, row in rows.items():
        if row.kind == "hidden":
            assert float(weights[name].detach().std()) == pytest.approx(row.shape[1] ** -0.5, rel=0.1), name
        if row.kind == "output":
            assert not weights[name].any(), name
    MuP(base_width=16).initialised(model)
    assert {name for name, row in rows.items() if row.kind == "hidden" and not weights[name].any()} == {
        name for name in rows if name.endswith("adaln.weight")
    }


def test_base_width_itself_has_the_recipes_rates():
    rows = MuP(base_width=64).table(model_of("ddt"))
    assert {row.factors for row in rows.values()} == {Factors()}
    assert {"input", "hidden", "output", "vector", "fixed"} == {row.kind for row in rows.values()}


def test_output_scale_and_decay():
    model = model_of("sit")
    rows = MuP(base_width=32, output_scale=4.0, scale_decay=False).table(model)
    assert rows["final_layer.linear.weight"].factors == Factors(lr=2.0, weight_decay=0.5, eps=0.5)
    assert rows["blocks.0.attn.qkv.weight"].factors == Factors(lr=0.5)
    assert MuP(base_width=32).table(model)["blocks.0.attn.qkv.weight"].factors == Factors(lr=0.5, weight_decay=2.0)


def test_bad_input():
    with pytest.raises(ValueError, match="base_width must be >= 1"):
        MuP(base_width=0)
    with pytest.raises(ValueError, match="width 24 makes num_heads no whole number from 4"):
        resized({"hidden_size": 64, "num_heads": 4}, 24)
    with pytest.raises(ValueError, match="no hidden_size"):
        resized({"depth": 2}, 24)


def test_optimizers_follow_the_factors():
    """Muon's steps shrink with the square root; AdamW's groups carry rate, decay and eps."""
    model = model_of("ddt")
    factors = MuP(base_width=16).factors(model)
    optimizer = Muon(lr=1e-2, weight_decay=0.1, rest=AdamW(lr=1e-3, weight_decay=0.1)).build(
        model.named_parameters(), factors
    )
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g for m in optimizer._members for g in m.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    block, last, time = (
        found[n] for n in ("blocks.0.attn.qkv.weight", "final_layer.linear.weight", "time_embedder.mlp.2.weight")
    )
    assert (block["lr"], block["weight_decay"]) == (pytest.approx(5e-3), pytest.approx(0.2))
    assert (last["lr"], last["weight_decay"], last["eps"]) == (
        pytest.approx(2.5e-4), pytest.approx(0.4), pytest.approx(4e-8),
    )  # fmt: skip
    assert (time["lr"], time["eps"]) == (pytest.approx(2.5e-4), pytest.approx(1e-8))
    optimizer.set_lr(0.5)
    assert max(optimizer.lr) == pytest.approx(5e-3 / 2)


def test_factor_in_front_of_the_last_layer_is_the_same_network():
    """Three steps of AdamW with the multiplier in front, and with it in the weight: equal outputs."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 16), torch.randn(8, 3)
    c = 0.25

    def trained(*, folded):
        weight = torch.nn.Parameter((c if folded else 1.0) * torch.linspace(-1, 1, 48).view(3, 16))
        given = {"w": Factors(c, 1 / c, 1 / c)} if folded else {}
        optimizer = AdamW(lr=0.1, eps=1e-3, weight_decay=0.1).build({"w": weight}, given)
        for _ in range(3):
            out = (1.0 if folded else c) * x @ weight.T
            (out - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return ((1.0 if folded else c) * x @ weight.T).detach()

    torch.testing.assert_close(trained(folded=True), trained(folded=False), rtol=1e-5, atol=1e-6)


def test_a_run_resumes_and_its_model_is_plain(tmp_path):
    recipe = tiny(**{"mup": {"base_width": 16}, "train.num_steps": 4})
    whole = Trainer(recipe, tmp_path / "whole")
    whole.fit()
    Trainer(recipe, tmp_path / "parts").fit(until=2)
    parts = Trainer(recipe, tmp_path / "parts")
    parts.fit()
    theirs = whole.networks.tensors()
    assert all(torch.equal(value, theirs[name]) for name, value in parts.networks.tensors().items())
    loaded = load(tmp_path / "whole", weights="raw").model
    x, t, condition = torch.randn(2, 1, 8, 8), torch.rand(2), Condition(labels=torch.tensor([1, 2]))
    with torch.no_grad():
        assert torch.equal(loaded(x, t, condition).sample, whole.networks.model(x, t, condition).sample)
    assert whole.networks.factors["blocks.0.attn.qkv.weight"].lr == 0.5


def test_activations_are_flat_under_mup_and_not_without():
    """Slopes over widths 32 to 512 on digits."""
    recipe = tiny(model={"kind": "sit", "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2})
    checks = {
        name: coordinate_check(parametrized(recipe, name, 32), (32, 128, 512), num_steps=3, seeds=(0,))
        for name in ("mup", "standard")
    }
    slopes = {name: check["slopes"] for name, check in checks.items()}
    assert max(slopes["standard"]["final_layer"][1:]) > 0.5
    assert max(row[-1] - row[0] for row in slopes["standard"].values() if row[0] is not None) > 0.15
    for layer, (first, *_, last) in slopes["mup"].items():
        assert abs(last) < 0.25, layer  # one seed: the narrowest model is an odd one
        assert first is None or abs(last - first) < 0.1, layer


def test_rates_are_swept_and_the_best_is_found(tmp_path, monkeypatch):
    recipe = parametrized(tiny(), "mup", 32)
    kept = tmp_path / "sweep" / "losses.jsonl"
    found = learning_rates(recipe, (32, 64), (1e-6, 3e-3), num_steps=12, kept=kept)
    assert found["best"] == [3e-3, 3e-3]
    assert all(low > high for low, high in found["losses"])
    with monkeypatch.context() as patch:
        patch.setattr(widths, "_loss", lambda recipe, num_steps: 7.0)  # finished runs are not run again, others are
        assert learning_rates(recipe, (32, 64), (1e-6, 3e-3), num_steps=12, kept=kept) == found
        other = replace(recipe, seed=1)
        assert learning_rates(other, (32,), (1e-6,), num_steps=12, kept=kept)["losses"] == [[7.0]]
        assert learning_rates(recipe, (32,), (1e-6,), num_steps=13, kept=kept)["losses"] == [[7.0]]
    muon = replace(recipe, optimizer=Muon(lr=1e-2, rest=AdamW(lr=1e-3)))
    assert with_rate(muon, 2e-2).optimizer.rest.lr == pytest.approx(2e-3)
    assert at_width(recipe, 64, head_width=8).model.options["num_heads"] == 8


def test_bench_writes_a_table_and_a_picture(tmp_path, capsys):
    from untwine.config import to_dict

    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(to_dict(tiny())))
    out = ["--out", str(tmp_path)]
    assert main(["bench", "mup", str(file), "--widths", "16", "32", "--steps", "1", "--seeds", "1", *out]) == 0
    assert "blocks.0.attn" in capsys.readouterr().out
    found = json.loads((tmp_path / "mup.json").read_text())
    assert found["parameters"]["blocks.0.attn.qkv.weight"]["base_shape"] == [48, 16]
    assert len(found["mup"]["slopes"]["blocks.0"]) == 2
    assert (tmp_path / "mup.png").stat().st_size > 10_000
    assert main(["bench", "mup", str(file), "--widths", "16", "32", "--lrs", "1e-3", "--steps", "1", *out]) == 0
    assert json.loads((tmp_path / "mup.json").read_text())["standard"]["best"] == [1e-3, 1e-3]
    assert main(["bench", "mup", str(file), "--widths", "32", *out]) == 2
    assert "widths must be at least two" in capsys.readouterr().err
