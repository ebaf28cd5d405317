"""What every schedule, predictor and attachment must hold to."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from untwine.acceleration.base import Attachment, match_sites
from untwine.acceleration.caching import PREDICTORS, SCHEDULES
from untwine.acceleration.caching.cache import Cache, CacheConfig
from untwine.acceleration.caching.correction import Affinity, Sums, fit_affine, fold
from untwine.acceleration.caching.predictors import Affine, Newton, Reuse, Taylor, When
from untwine.acceleration.caching.schedules import (
    CacheQuant,
    ErrorGated,
    Explicit,
    Gate,
    Uniform,
    WarmUp,
    dynamic_programming,
    segment_costs,
    uniform,
    uniform_budget,
)
from untwine.config import Component, from_dict
from untwine.contracts import Condition, StepInfo
from untwine.models.ddt import DDT
from untwine.models.dit import ImprovedDiT
from untwine.models.layers.compile import compile_blocks, decompile_blocks

N = 12
ERROR = [[float(abs(i - j)) for i in range(N)] for j in range(N)]
OPTIONS = {
    "explicit": {"at": [0, 3, 4]},
    "cachequant": {"interval": 3, "error": ERROR},
    "dynamic_programming": {"budget": 4, "error": ERROR},
    "affine": {"tables": {("", 0): Affinity(torch.ones(N, 5), torch.zeros(N, 5))}},
}


def make(kind="improved_dit"):
    torch.manual_seed(0)
    split = {"encoder_depth": 1} if kind == "ddt" else {}
    model = {"ddt": DDT, "improved_dit": ImprovedDiT}[kind](
        in_channels=1, hidden_size=16, depth=3, num_heads=2, num_classes=3, **split
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def evaluate(model, step=None, num_steps=4, scale=1.0):
    """One network call over 2 samples, in a generation when a step is given."""
    if step is not None:
        for attachment in model.attached:
            attachment.before_step(StepInfo(step, 0, num_steps), ("cond",))
    x = scale * torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)
    return model(x, torch.tensor([0.3, 0.6]), Condition(labels=torch.tensor([0, 2]))).sample


# schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_schedules_start_at_the_first_step_and_survive_their_config(kind):
    schedule = Component("untwine.acceleration.caching:SCHEDULES", kind, OPTIONS.get(kind, {})).build()
    if isinstance(schedule, ErrorGated):
        return
    steps = schedule.steps(N)
    assert steps[0] == 0 and all(a < b for a, b in pairwise(steps)) and steps[-1] < N
    assert 0 <= schedule.differences_from <= max(steps)
    assert SCHEDULES.name_of(type(schedule)) == kind


def matrix(draw, n, values):
    return torch.tensor([[draw(values) for _ in range(n)] for _ in range(n)], dtype=torch.float64)


def total(costs, steps):
    return sum(float(costs[a, b]) for a, b in pairwise((*steps, len(costs))))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dynamic_programming_is_brute_force_and_no_worse_than_uniform(data):
    n = data.draw(st.integers(1, 12))
    costs = segment_costs(matrix(data.draw, n, st.integers(0, 6).map(float)))  # integers: ties and exact sums
    budget = data.draw(st.integers(1, n))
    low = data.draw(st.integers(1, n // budget))
    high = data.draw(st.integers(-(-n // budget), n))
    steps, cost = dynamic_programming(costs, budget, min_length=low, max_length=high)
    every = [(0, *rest) for rest in combinations(range(1, n), budget - 1)]
    possible = [chosen for chosen in every if all(low <= b - a <= high for a, b in pairwise((*chosen, n)))]
    best = min(total(costs, chosen) for chosen in possible)
    assert steps in possible and cost == total(costs, steps) == best
    # Of equal ones the last step is the lowest, then the one before it.
    assert steps == min((c for c in possible if total(costs, c) == best), key=lambda c: c[::-1])
    assert cost <= total(costs, uniform_budget(n, budget)) or uniform_budget(n, budget) not in possible


def test_segment_costs_are_sums():
    error = torch.tensor([[1.0, 2.0, 3.0], [9.0, 4.0, 5.0], [9.0, 9.0, 6.0]])
    assert segment_costs(error).tolist() == [[0, 1, 3, 6], [0, 0, 4, 9], [0, 0, 0, 6]]


@pytest.mark.parametrize("budget", [0, -1, N + 1, True])
def test_budgets_outside_the_steps_are_refused(budget):
    with pytest.raises(ValueError, match=f"budget must be within \\[1, num_steps = {N}\\]"):
        dynamic_programming(segment_costs(torch.tensor(ERROR)), budget)
    with pytest.raises(ValueError, match="budget must be within"):
        uniform_budget(N, budget)


def test_impossible_schedules_are_refused():
    costs = segment_costs(torch.tensor(ERROR))
    with pytest.raises(ValueError, match="budget 2 cannot cover 12 steps with segments of 1 to 5"):
        dynamic_programming(costs, 2, max_length=5)
    with pytest.raises(ValueError, match="budget 5 cannot cover 12 steps with segments of 3 to 12"):
        dynamic_programming(costs, 5, min_length=3)
    with pytest.raises(ValueError, match="infinite"):
        dynamic_programming(torch.full_like(costs, torch.inf), 3)
    with pytest.raises(ValueError, match="must be \\(N, N\\)"):
        segment_costs(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="measured over 12 steps and this run has 20"):
        CacheQuant(3, torch.tensor(ERROR)).steps(20)
    with pytest.raises(ValueError, match="names step 9, but there are 8"):
        Explicit((0, 9)).steps(8)
    for wrong in ((), (1, 2), (0, 3, 3)):
        with pytest.raises(ValueError, match="start at 0"):
            Explicit(wrong)
    with pytest.raises(ValueError, match="every"):
        uniform(4, 0)


def test_published_intervals():
    assert WarmUp(6, 3).steps(28) == (0, 1, 2, 8, 14, 20, 26)
    assert WarmUp(5, 1).steps(16) == (0, 5, 10, 15)
    assert WarmUp(1, 2).steps(9) == tuple(range(9))
    assert WarmUp(4, 9).steps(6) == tuple(range(6))
    assert uniform_budget(10, 4) == (0, 2, 5, 7)


def test_error_gate_accumulates_and_limits_skips():
    gate, taken = Gate(), []
    schedule = ErrorGated(threshold=1.0, max_skips=3, first=2, last=1)
    for step, change in enumerate([9.0, 0.0, 0.4, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0]):
        computes, gate = schedule.decide(gate, change, step, 12)
        taken += [step] if computes else []
    # 0, 1 at the start; 4 by 0.4 * 3; 8 after three skips; 11 at the end
    assert taken == [0, 1, 4, 8, 11]


# predictors --------------------------------------------------------------------------------------------------------


def follow(predictor, fn, steps, **options):
    history = None
    for step in steps:
        history = predictor.update(history, fn(step), When(step, 0, 1 - step / 40), **options)
    return history


@pytest.mark.parametrize("kind", sorted(PREDICTORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictors_are_pure_and_exact_on_constants(kind, dtype):
    predictor = PREDICTORS[kind](**OPTIONS.get(kind, {}))
    value = torch.linspace(-3, 3, 30).view(2, 3, 5).to(dtype)
    history = follow(predictor, lambda _: value, (0, 1, 4))
    kept = [factor.clone() for factor in history.factors]
    after = predictor.update(history, 2 * value, When(6, 0, 0.5))
    predicted = predictor.predict(history, When(9, 0, 0.3))
    assert predicted.dtype == dtype and torch.equal(predicted, value)
    assert all(torch.equal(a, b) for a, b in zip(kept, history.factors)) and after is not history
    assert history.nbytes == sum(factor.nbytes for factor in history.factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forecast", [Taylor, Newton])
def test_order_zero_is_reuse_bit_for_bit(forecast, dtype):
    values = torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    a, b = (follow(p, lambda s: values[s], (0, 2, 5)) for p in (forecast(0), Reuse()))
    assert torch.equal(forecast(0).predict(a, When(8)), Reuse().predict(b, When(8)))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_newton_is_exact_on_polynomials_and_taylor_on_lines(order):
    coefficients = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))

    def polynomial(degree, scale=1.0):
        return lambda s: sum(coefficients[i] * (s / 10 * scale) ** i for i in range(degree + 1))

    steps = (0, 1, 4, 5, 8)
    for fn, predictor in ((polynomial(1), Taylor(order)), (polynomial(order), Newton(order))):
        history = follow(predictor, fn, steps)
        torch.testing.assert_close(predictor.predict(history, When(10)), fn(10), rtol=1e-5, atol=2e-5)
    in_time = Newton(order, coordinate="t")
    history = follow(in_time, polynomial(order), steps)  # t is linear in the step here
    torch.testing.assert_close(in_time.predict(history, When(10, 0, 0.75)), polynomial(order)(10), rtol=1e-5, atol=2e-5)


def test_factors_may_be_kept_in_half_the_bytes():
    value = torch.linspace(-1, 1, 24).view(2, 12)
    full, half = (follow(Taylor(2, dtype), lambda s: s * value, (0, 2, 5)) for dtype in ("float32", "bfloat16"))
    assert full.nbytes == 2 * half.nbytes == 3 * value.nbytes
    torch.testing.assert_close(Taylor(2).predict(half, When(7)), 7 * value, rtol=0.02, atol=0.02)


def test_configs_are_plain_data():
    data = {
        "schedule": {"kind": "taylor", "interval": 5},
        "sites": ["head"],
        "predictor": {"kind": "newton", "order": 2},
    }
    config = from_dict(CacheConfig, data)
    assert config == CacheConfig(schedule=WarmUp(5), sites=("head",), predictor=Newton(2))
    with pytest.raises(ValueError, match="unknown predictor 'tailor'; did you mean 'taylor'"):
        from_dict(CacheConfig, {"predictor": {"kind": "tailor"}})


def test_taylor_is_the_published_recursion_not_newton_on_uneven_steps():
    def square(step):
        return torch.tensor([float(step**2)])

    history = follow(Taylor(2), square, (0, 1, 4))
    # f1 = (16 - 1) / 3 = 5, before it 1; f2 = (5 - 1) / 3
    assert [float(f) for f in history.factors] == pytest.approx([16, 5, 4 / 3])
    assert float(Taylor(2).predict(history, When(6))) == pytest.approx(16 + 5 * 2 + 4 / 3 * 2)
    assert len(follow(Taylor(2), square, (0, 1, 4), differences=False).factors) == 1
    with pytest.raises(ValueError, match="order must be 0, 1, 2, 3 or 4, got 5"):
        Taylor(5)
    with pytest.raises(ValueError, match="coordinate='step'"):
        Newton(1, coordinate="t").predict(
            Newton(1).update(follow(Newton(1), square, (0,)), square(1), When(1)), When(2)
        )


def test_affine_correction_fits_streams_and_folds_exactly():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 9, 6, generator=generator)
    x[..., 5] = 0.25  # a dead channel
    scale, shift = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    y = scale * x + shift
    a, b = fit_affine(y, x)
    n = 36
    torch.testing.assert_close(a[:5], scale[:5] * (n - 1) / n, rtol=1e-5, atol=1e-6)
    assert a[5] == 1 and b[5] == pytest.approx(float(y[..., 5].mean() - 0.25), abs=1e-6)
    sums = Sums()
    for rows in zip(x, y):
        sums.add(*rows)
    torch.testing.assert_close(torch.stack(sums.fit()), torch.stack((a, b)), rtol=0, atol=1e-6)
    weight, bias = torch.randn(6, 6, generator=generator), torch.randn(6, generator=generator)
    for given_bias in (bias, None):
        after = a * torch.nn.functional.linear(x, weight, given_bias) + b
        torch.testing.assert_close(
            torch.nn.functional.linear(x, *fold(weight, given_bias, a, b)), after, atol=1e-6, rtol=1e-6
        )
    with pytest.raises(ValueError, match=r"tables have no entry for blocks\.1, stage 0, step 3"):
        Affine().predict(Reuse().update(None, x, When(0)), When(3), "blocks.1")
    with pytest.raises(ValueError, match="same shape"):
        Sums().add(x, y[:1])


# attachments -------------------------------------------------------------------------------------------------------


class Doubling(Attachment):
    """Stands in for sites and doubles what they compute."""

    def __init__(self, *patterns):
        self.patterns = patterns

    def claim(self, model):
        return match_sites(model, self.patterns)

    def call(self, site, at, forward, args, kwargs):
        return 2 * forward(*args, **kwargs)

    def report(self):
        return {}


def state_of(model):
    """Every instance attribute of every module."""
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", ["ddt", "improved_dit"])
@pytest.mark.parametrize("attachment", [Doubling("blocks.*.attn", "final_layer"), Cache()])
def test_attachments_leave_no_trace(kind, attachment):
    model = make(kind)
    before, attributes, weights = evaluate(model), state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), attachment.attach(model):
        assert model.attached == [attachment] and attachment.sites
        assert torch.equal(evaluate(model), before)  # outside of a generation
        evaluate(model, 0)
        evaluate(model, 1, scale=2.0)
        assert model.state_dict().keys() == weights.keys() and "attached" not in model.config
        raise KeyError
    assert state_of(model) == attributes and attachment.sites == () and attachment.at is None
    assert torch.equal(evaluate(model), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    attachment.detach()  # once more does nothing


def test_matching_names_one_part_of_the_path_each():
    model = make()
    assert match_sites(model, ["blocks.*"]) == ("blocks.0", "blocks.1", "blocks.2")
    assert match_sites(model, ["blocks.[01].mlp", "final_layer"]) == ("blocks.0.mlp", "blocks.1.mlp", "final_layer")
    with pytest.raises(ValueError, match=r"'blocks.\*.atn' matches no site of ImprovedDiT; did you mean 'blocks"):
        match_sites(model, ["blocks.*.attn", "blocks.*.atn"])
    for wrong, hint in (("blocks.7", "blocks"), ("sublayer", "sublayers")):
        with pytest.raises(ValueError, match=f"matches no site of ImprovedDiT; did you mean '{hint}"):
            Cache(CacheConfig(sites=(wrong,))).attach(model)
    assert not model.attached


def test_what_cannot_be_attached_is_refused():
    model = make()
    with Doubling("blocks.1").attach(model) as first:
        for clash in ("blocks.1", "blocks.1.attn"):
            with pytest.raises(ValueError, match=f"site {clash}: an attached Doubling has claimed blocks.1"):
                Doubling(clash).attach(model)
        with pytest.raises(ValueError, match="attached already"):
            first.attach(make())
        with Doubling("blocks.0").attach(model) as second:
            assert model.attached == [first, second]
        assert model.attached == [first]
    with pytest.raises(ValueError, match="at least one site"):
        Doubling().attach(model)
    for sites in (("blocks.*", "blocks.*.attn"), ("blocks", "head"), ("final_layer", "head")):
        with pytest.raises(ValueError, match="the same or one inside the other"):
            Cache(CacheConfig(sites=sites)).attach(model)


def test_deep_copies_have_attachments_of_their_own():
    model = make()
    plain = evaluate(model)
    with Doubling("blocks.*.mlp").attach(model) as attached:
        doubled = evaluate(model, 0)
        attached.reset()
        twin = copy.deepcopy(model)
        assert torch.equal(evaluate(twin, 0), doubled) and torch.equal(evaluate(model), plain)
        with torch.no_grad():
            twin.blocks[0].mlp.w1.weight.zero_()
        assert torch.equal(evaluate(model, 0), doubled)
    assert torch.equal(evaluate(model), plain)
    assert not torch.allclose(evaluate(twin, 1), plain)
    twin.attached[0].detach()
    assert not twin.attached and "forward" not in twin.blocks[0].mlp.__dict__


def test_whole_blocks_may_be_compiled_before_and_nothing_after():
    model = make()
    with Doubling("blocks.1").attach(model):
        doubled = evaluate(model, 0)
    compile_blocks(model, backend="eager")
    with pytest.raises(ValueError, match=r"blocks.0.attn lies inside blocks.0, which is compiled"):
        Doubling("blocks.*.attn").attach(model)
    compiled = [block._compiled_call_impl for block in model.blocks]
    with Doubling("blocks.1").attach(model):
        torch.testing.assert_close(evaluate(model, 0), doubled, rtol=1e-5, atol=1e-5)
        twin = copy.deepcopy(model)  # a deep copy is not compiled
        twin.attached[0].detach()
        assert all("_compiled_call_impl" not in block.__dict__ for block in twin.blocks)
    assert [block._compiled_call_impl for block in model.blocks] == compiled
    decompile_blocks(model)
    with Doubling("blocks.*.mlp").attach(model):
        compile_blocks(model, backend="eager")
        with pytest.raises(Exception, match="cannot be compiled while attached to"):
            evaluate(model, 0)


def test_attachments_survive_sharding(tmp_path):
    model = make()
    with Doubling("blocks.1").attach(model):
        doubled = evaluate(model, 0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        attached = Doubling("blocks.1").attach(model)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        assert torch.equal(evaluate(model, 0), doubled)
        attached.detach()
        with Cache(CacheConfig(schedule=Uniform(2), sites=("blocks",), predictor=Reuse())).attach(model):
            first, second = evaluate(model, 0), evaluate(model, 1)
        assert torch.equal(first, second) and not model.attached
    finally:
        dist.destroy_process_group()


def test_a_new_generation_is_recognised_without_a_reset():
    model = make()
    with Cache(CacheConfig(schedule=Uniform(2), predictor=Reuse())).attach(model) as cache:
        first = [evaluate(model, step, scale=1 + step) for step in range(4)]
        again = [evaluate(model, step, scale=1 + step) for step in range(4)]
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert cache.report()["steps_computed"] == 4 and cache.report()["steps_skipped"] == 4
