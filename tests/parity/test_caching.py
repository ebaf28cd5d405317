"""Schedules, forecasts and corrections against the official codes of DDT's sharing, TaylorSeer and CacheQuant."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parity.cases import NOT_RUN, ROOT, Case, Missing
from untwine.acceleration.caching.cache import Cache, CacheConfig
from untwine.acceleration.caching.correction import Affinity, Sums, fit_affine, fold
from untwine.acceleration.caching.predictors import Reuse, Taylor, When
from untwine.acceleration.caching.schedules import (
    CacheQuant,
    DynamicProgramming,
    WarmUp,
    dynamic_programming,
    segment_costs,
    uniform,
)
from untwine.contracts import Site, StepInfo


def told(slug, word):
    """The cases of a system whose official file or class holds ``word``; not all of them have a class."""
    found = []
    for path in sorted((ROOT / slug).glob("*.json")):
        meta = json.loads(path.read_text())
        if word in f"{meta['file']} {meta.get('class', '')}":
            found.append(pytest.param(Case(path, meta), id=path.stem))
    if found:
        return found
    reason = f"{NOT_RUN}: no case of {slug} of {word} in {ROOT}; set UNTWINE_PARITY to the folder of cases"
    required = os.environ.get("UNTWINE_REQUIRE_PARITY") == "1"
    return [pytest.param(Missing(reason), id=NOT_RUN, marks=() if required else pytest.mark.skip(reason=reason))]


def total(costs, steps):
    return sum(float(costs[a, b]) for a, b in pairwise((*steps, len(costs))))


@pytest.mark.parametrize("case", told("ddt", "sharing_dp"))
def test_encoder_sharing_by_dynamic_programming(case):
    states = case.inputs["states"].double()
    normed = F.normalize(states, dim=-1)
    similarity = torch.einsum("iblc,jblc->ij", normed, normed) / states[0, ..., 0].numel()
    case.check("similarity", similarity)
    costs = segment_costs(1 - similarity)
    case.check("error_cumulative", costs[:, 1:].T.tril() + (1 - similarity).triu(1))
    for budget in case.kwargs["K"]:
        steps, cost = dynamic_programming(costs, budget)
        assert steps == tuple(case.outputs[f"K{budget}/recompute"].tolist())
        assert cost == pytest.approx(float(case.outputs[f"K{budget}/cost"][-1, -1]), abs=case.tolerance)
        assert DynamicProgramming(budget, 1 - similarity).steps(len(costs)) == steps


@pytest.mark.parametrize("case", told("taylorseer", "taylor_utils, cache_functions"))
def test_forecast_sequences(case):
    features = case.inputs["features"]
    for k, spec in enumerate(case.meta["specs"]):
        schedule = WarmUp(spec["interval"], spec.get("first_enhance", 2))
        computed = schedule.steps(len(features))
        mask = torch.tensor([i in computed for i in range(len(features))]).long()
        assert torch.equal(mask, case.outputs[f"{k}/computed"]), spec
        predictor = Taylor(spec["order"])
        history, used, reused = None, [], []
        for i, value in enumerate(features):
            if i in computed:
                differences = i >= schedule.differences_from
                history = predictor.update(history, value, When(i), differences=differences)
                plain = Reuse().update(None, value, When(i))
            used.append(predictor.predict(history, When(i)))
            reused.append(Reuse().predict(plain, When(i)))
        case.check(f"{k}/used", torch.stack(used))
        if spec["order"] == 0:
            assert torch.equal(torch.stack(used), torch.stack(reused))


@pytest.mark.parametrize("case", told("cachequant", "calculate_abCov"))
def test_cachequant_schedule_and_corrections(case):
    features, interval = case.inputs["features"], case.meta["interval"]
    num_steps = len(features)
    error = torch.stack([(features - head).abs().flatten(1).sum(1, dtype=torch.float64) for head in features])
    bounded = CacheQuant(interval, error).steps(num_steps)
    free = CacheQuant(interval, error, bounded=False).steps(num_steps)
    costs = segment_costs(error)
    for kind, steps in (("bounded", bounded), ("unbounded", free)):
        assert steps == tuple(case.outputs[f"schedule_{kind}"].tolist())
        assert total(costs, steps) == pytest.approx(float(case.outputs[f"cost_{kind}"]), rel=1e-6)
    uniform_cost = total(costs, uniform(num_steps, interval))
    assert uniform_cost == pytest.approx(float(case.outputs["cost_uniform"]), rel=1e-6)

    channels_last = features.movedim(2, -1)
    a, b = torch.ones(num_steps, features.shape[2]), torch.zeros(num_steps, features.shape[2])
    head, corrected = None, []
    for t in range(num_steps):
        if t in bounded:
            head = channels_last[t]
        else:
            sums = Sums()
            for row, value in zip(head, channels_last[t]):  # streamed
                sums.add(row, value)
            a[t], b[t] = sums.fit()
        corrected.append(Affinity(a, b).apply(head, t).movedim(-1, 1))
    case.check("cache_a", a)
    case.check("cache_b", b)
    case.check("cache_corrected", torch.stack(corrected))

    weight, bias, quantized = case.inputs["weight"], case.inputs["bias"], case.outputs["quant_q_weight"]
    for t, x in enumerate(corrected):
        q_act = case.outputs["quant_q_act"][t]
        exact, rounded = F.conv2d(x, weight, bias), F.conv2d(q_act, quantized, bias)
        scale, shift = fit_affine(exact.movedim(1, -1), rounded.movedim(1, -1))
        torch.testing.assert_close(scale, case.outputs["quant_dec_a"][t], rtol=0, atol=case.tolerance)
        torch.testing.assert_close(shift, case.outputs["quant_dec_b"][t], rtol=0, atol=case.tolerance)
        q_act, scale, shift, q_weight, q_bias = (v.double() for v in (q_act, scale, shift, quantized, bias))
        folded = F.conv2d(q_act, *fold(q_weight, q_bias, scale, shift))
        after = scale.view(-1, 1, 1) * F.conv2d(q_act, q_weight, q_bias) + shift.view(-1, 1, 1)
        torch.testing.assert_close(folded, after, rtol=0, atol=1e-6)


class Block(nn.Module):
    """A block of the official DiT (arXiv 2212.09748), under its official names."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", nn.GELU(approximate="tanh"))
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate_a * self.attn(norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(norm(x) * (1 + scale_m) + shift_m)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class OfficialDiT(nn.Module):
    """The official DiT with the sites that TaylorSeer caches in it."""

    def __init__(self, *, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes):
        super().__init__()
        d, self.patch, self.num_classes = hidden_size, patch_size, num_classes
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, d, patch_size, patch_size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (input_size // patch_size) ** 2, d))
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, d)})
        self.blocks = nn.ModuleList(Block(d, num_heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d)),
                "linear": nn.Linear(d, 2 * in_channels * patch_size**2),
            }
        )

    def sites(self):
        kinds = {"attn": "attention", "mlp": "mlp"}
        blocks = range(len(self.blocks))
        return {f"blocks.{i}.{name}": Site(kind, "trunk", i) for i in blocks for name, kind in kinds.items()}

    def forward(self, x, t, y):
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None] * torch.exp(-torch.arange(128) * torch.tensor(10000.0).log() / 128)
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        tokens = self.final_layer["linear"](norm(tokens) * (1 + scale) + shift)
        side, p = x.shape[-1] // self.patch, self.patch
        tokens = tokens.unflatten(1, (side, side)).unflatten(-1, (p, p, -1))  # B, rows, columns, p, p, C
        return tokens.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])


@torch.no_grad()
def ddim(model, noise, labels, num_steps, cfg_scale):
    """The official sampler: linear betas, respaced, eta 0; guidance on the first three channels."""
    steps = torch.linspace(0, 999, num_steps, dtype=torch.float64).round().long()
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[steps]
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    y = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    x, trajectory = noise, []
    for k, i in enumerate(reversed(range(num_steps))):
        for attachment in getattr(model, "attached", ()):
            attachment.before_step(StepInfo(k, 0, num_steps), ("cond", "null"))
        out = model(torch.cat([x, x]), steps[i].float().expand(len(y)), y)[:, : x.shape[1]]
        cond, null = out.chunk(2)
        eps = torch.cat([null[:, :3] + cfg_scale * (cond - null)[:, :3], cond[:, 3:]], 1).double()
        x0 = (x - (1 - kept[i]).sqrt() * eps) / kept[i].sqrt()
        x = (before[i].sqrt() * x0 + (1 - before[i]).sqrt() * eps).float()
        trajectory.append(x)
    return torch.stack(trajectory)


@pytest.mark.parametrize("case", told("taylorseer", "ddim_sample_loop"))
def test_taylorseer_on_the_official_dit(case):
    model = OfficialDiT(**case.kwargs)
    model.load_state_dict(case.state)
    arguments = (case.inputs["noise"], case.inputs["y"], len(case.outputs["trajectory"]), case.meta["cfg_scale"])
    case.check("trajectory_no_cache", ddim(model, *arguments), relative=True)
    config = CacheConfig(schedule=WarmUp(case.meta["interval"], 2), predictor=Taylor(case.meta["max_order"]))
    with Cache(config).attach(model) as cache:
        case.check("trajectory", ddim(model, *arguments), relative=True)
        report = cache.report()
    assert report["steps_computed"] == len(config.schedule.steps(arguments[2]))
    case.check("trajectory_no_cache", ddim(model, *arguments), relative=True)
