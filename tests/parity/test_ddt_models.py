"""DDT and the improved DiT against the official code's numbers, and the files that official weights come in."""

from __future__ import annotations

import math

import pytest
import torch

import untwine
from tests.parity.cases import cases
from untwine.contracts import Condition
from untwine.models.ddt import DDT
from untwine.models.dit import ImprovedDiT
from untwine.models.layers.embeddings import TimestepEmbedding, sinusoid
from untwine.models.layers.rope import image_positions, rope_tables

DDT_FILE, DIT_FILE = "decoupled_improved_dit.py", "denoiser/improved_dit.py"


def arguments(case, suffix=""):
    """x, t, condition of a case: official time runs from noise to data."""
    x, t, y = (case.inputs[name + suffix] if name + suffix in case.inputs else case.inputs[name] for name in "xty")
    return x, 1 - t, Condition(labels=y)


@pytest.mark.parametrize("case", cases("ddt", klass="DDT", file=DDT_FILE), ids=str)
def test_ddt(case):
    """Velocity and state; the decoder under a given state; the encoder under a mask."""
    model = untwine.from_official("ddt", case.state, case.kwargs)
    assert isinstance(model, DDT)
    x, t, condition = arguments(case)
    state = model.encode(x, t, condition)
    mask = case.inputs.get("mask")
    masked = model.encode(x, t, condition, attention_mask=mask)
    results = {
        "state": state.tokens,
        "velocity": -model(x, t, condition).sample,
        "state_masked": masked.tokens,
        "velocity_masked": -model(x, t, condition, attention_mask=mask).sample,
    }
    if "x_next" in case.inputs:
        x_next, t_next, _ = arguments(case, "_next")
        results["velocity_given_state"] = -model(x_next, t_next, condition, state=state).sample
        case.check("velocity_given_state", -model.decode(x_next, model.modulate(state)).sample)
    for name in case.outputs:
        case.check(name, results[name])


@pytest.mark.parametrize("case", cases("ddt", klass="DiT", file=DIT_FILE), ids=str)
def test_improved_dit(case):
    model = untwine.from_official("ddt", case.state, case.kwargs)
    assert isinstance(model, ImprovedDiT)
    assert case.inputs.keys() == {"x", "t", "y"}, "a case with masks needs a test of its own"
    case.check("velocity", -model(*arguments(case)).sample)


@pytest.mark.parametrize("case", cases("ddt", klass="precompute_freqs_cis_2d"), ids=str)
def test_rope_tables(case):
    for name, options in case.kwargs["rope"].items():
        positions = image_positions(options["height"], options["width"])
        cos, sin = rope_tables(positions, options["head_dim"])
        case.check(f"rope/{name}", torch.stack((cos, sin), -1)[0, :, 0])


@pytest.mark.parametrize("case", cases("ddt", klass="timestep_embedding"), ids=str)
def test_time_embedding(case):
    for dim in case.kwargs["time_embed"]:
        case.check(f"time_embed/{dim}", sinusoid(case.inputs["t"], dim, max_period=10.0))


def test_time_flip_is_exact():
    """Sine columns negated and origin 1: bitwise the official embedding at every time that both clocks can show."""
    torch.manual_seed(0)
    official = TimestepEmbedding(32, scale=1.0, origin=0.0, max_period=10.0)
    ours = TimestepEmbedding(32, scale=1.0, origin=1.0, max_period=10.0)
    weights = official.state_dict()
    half = official.frequency_dim // 2
    weights["mlp.0.weight"] = torch.cat((weights["mlp.0.weight"][:, :half], -weights["mlp.0.weight"][:, half:]), 1)
    ours.load_state_dict(weights)
    t = torch.arange(0, 257) / 256
    assert torch.equal(ours(t), official(1 - t))
    assert not torch.equal(ours(t), official(t))


def test_frequencies_fall_geometrically():
    """The first frequency is 1, and the last one is one factor short of 1 / max_period."""
    embedded = sinusoid(torch.tensor([0.5]), 8, max_period=10.0)[0]
    expected = [0.5 * 10 ** (-k / 4) for k in range(4)]
    assert embedded[:4].tolist() == pytest.approx([math.cos(v) for v in expected])
    assert embedded[4:].tolist() == pytest.approx([math.sin(v) for v in expected])
