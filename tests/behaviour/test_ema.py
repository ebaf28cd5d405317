"""Averages of weights: what each profile weighs, and that applying one leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from untwine.training.ema import EMA, PROFILES, ConstantEMA, EMAProfile, HalflifeEMA, PowerEMA


def profile_weights(profile: EMAProfile, steps: int, batch_size: int = 1) -> torch.Tensor:
    """How much of the parameters after step k is in the average after the last: by feeding unit vectors."""
    live = torch.zeros(steps + 1, dtype=torch.float32)
    live[0] = 1
    ema = EMA(profile, {"w": live})
    for step in range(1, steps + 1):
        live.zero_()[step] = 1
        ema.update(step, batch_size)
    return ema.tensors()["w"]


def test_constant_weighs_geometrically():
    weights = profile_weights(ConstantEMA(decay=0.9), 50)
    expected = torch.tensor([0.9**50] + [0.1 * 0.9 ** (50 - k) for k in range(1, 51)])
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-8)


def test_warm_up_forgets_the_start():
    slow, warm = (profile_weights(ConstantEMA(decay=0.9999, warmup=w), 100) for w in (False, True))
    assert slow[0] > 0.98
    assert warm[0] < 1e-6
    assert ConstantEMA(decay=0.9999, warmup=True).decay_at(10**6, 1) == 0.9999


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.15, 0.25])
def test_power_has_the_width_it_is_named_after(sigma_rel):
    """Mean and standard deviation of the measured profile, as fractions of the run (arXiv 2312.02696, eq. 3 to 6)."""
    steps = 2000
    weights = profile_weights(PowerEMA(sigma_rel=sigma_rel), steps).double()
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    mean = (weights * times).sum()
    width = (weights * (times - mean) ** 2).sum().sqrt()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-4)
    assert float(width) == pytest.approx(sigma_rel, rel=0.01)
    gamma = PowerEMA(sigma_rel=sigma_rel).gamma
    assert float(mean) == pytest.approx((gamma + 1) / (gamma + 2), abs=2e-3)


def test_published_exponents():
    assert PowerEMA(sigma_rel=0.05).gamma == pytest.approx(16.97, abs=0.01)
    assert PowerEMA(sigma_rel=0.10).gamma == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("batch_size", [10, 50])
def test_half_life_counts_images(batch_size):
    weights = profile_weights(HalflifeEMA(images=1000, ramp_up=None), 4000 // batch_size, batch_size)
    assert float(weights[-1000 // batch_size :].sum()) == pytest.approx(0.5, abs=1e-4)


def test_half_life_ramps_up():
    profile = HalflifeEMA(images=1000, ramp_up=0.1)
    assert profile.decay_at(10, 10) == pytest.approx(0.5)
    assert profile.decay_at(10**4, 10) == 0.5**0.01


def test_registered_profiles_stay_between_old_and_new():
    for name in PROFILES:
        profile = PROFILES[name]()
        assert all(0 <= profile.decay_at(step, 32) < 1 for step in (1, 2, 100, 10**7))
        assert issubclass(PROFILES[name], EMAProfile)
        assert PROFILES.name_of(type(profile)) == name


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ConstantEMA(decay=1.0), r"decay must be within \[0, 1\), got 1.0"),
        (lambda: PowerEMA(sigma_rel=0.3), "sigma_rel must be within"),
        (lambda: HalflifeEMA(images=0), "images and ramp_up must be > 0"),
        (lambda: EMA(ConstantEMA(), {}), "named_params is empty"),
        (lambda: EMA(ConstantEMA(), {"i": torch.ones(2, dtype=torch.int64)}), r"floating point tensors.*\['i'\]"),
        (
            lambda: EMA(ConstantEMA(), {"w": torch.ones(2)}).update(0, 1),
            "step and batch_size must be >= 1, got 0 and 1",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_half_precision_weights_are_averaged_in_float32():
    model = nn.Linear(4, 4).bfloat16()
    ema = EMA(ConstantEMA(decay=0.999), model.named_parameters())
    start = model.weight.detach().float()
    with torch.no_grad():
        model.weight.add_(1)
    moved = model.weight.detach().float() - start
    for step in range(1, 11):
        ema.update(step, 1)
    expected = start + moved * (1 - 0.999**10)
    torch.testing.assert_close(ema.tensors()["weight"], expected, rtol=0, atol=1e-6)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_weights_leave_no_trace(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).to(dtype)
    ema = EMA(ConstantEMA(decay=0.5), model.named_parameters())
    with torch.no_grad():
        model[0].weight.normal_()
    ema.update(1, 1)
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    average = {n: t.clone() for n, t in ema.tensors().items()}
    with pytest.raises(Stop), ema.applied(model):
        assert all(torch.equal(p, average[n].to(dtype)) for n, p in model.named_parameters())
        assert not torch.equal(model[0].weight, own["0.weight"])
        with torch.no_grad():
            model[0].weight.fill_(math.nan)
        raise Stop
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())
    assert all(torch.equal(t, average[n]) for n, t in ema.tensors().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_does_not_fit_is_left_alone():
    ema = EMA(ConstantEMA(), nn.Linear(2, 2).named_parameters())
    other = nn.Linear(2, 3)
    own = other.weight.detach().clone()
    with pytest.raises(ValueError, match=r"parameter weight of shape \(2, 2\), found \(3, 2\)"), ema.applied(other):
        pass
    assert torch.equal(other.weight, own)
