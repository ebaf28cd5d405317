"""The cache in sampling: what runs, what is kept, how close the images stay, and what happens when things go wrong."""

from __future__ import annotations

from collections import Counter
from functools import cache as memoize

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.contracts.test_acceleration import make
from untwine.acceleration.caching.cache import Cache, CacheConfig
from untwine.acceleration.caching.calibration import calibrate, measure
from untwine.acceleration.caching.predictors import Affine, Newton, Reuse, Taylor
from untwine.acceleration.caching.schedules import (
    All,
    CacheQuant,
    DynamicProgramming,
    ErrorGated,
    Explicit,
    Uniform,
    WarmUp,
    dynamic_programming,
    segment_costs,
    uniform_budget,
)
from untwine.contracts import Condition, StepInfo
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import Branch, Guided, Interval, classifier_free
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import Cancelled, Sampling, integrate, sample
from untwine.diffusion.solvers import Euler, Heun
from untwine.diffusion.timesteps import TimeGrid
from untwine.pipelines.loading import load

STEPS = 12


def run(model, *, num_images=2, seed=0, num_steps=STEPS, size=8, on_step=None, **options):
    """Guided images; the null branch joins at t < 0.7."""
    settings = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.7), **options}
    sampling = Sampling(num_inference_steps=num_steps, **settings)
    labels, shape = torch.arange(num_images) % model.config.num_classes, (1, size, size)
    draws, index = Draws(seed), torch.arange(num_images)
    return sample(model, Condition(labels=labels), shape, index, draws=draws, sampling=sampling, on_step=on_step)[0]


def calls_of(model, names):
    """Counts the calls of submodules, which a skipped site does not make."""
    counts = Counter()
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize("kind", ["ddt", "improved_dit"])
@pytest.mark.parametrize("unit", ["sublayers", "blocks", "head", "blocks.*"])
def test_computing_every_step_changes_no_bit(kind, unit):
    model = make(kind)
    exact = run(model)
    for schedule in (All(), WarmUp(1, 2), WarmUp(4, STEPS), ErrorGated(0.0, "blocks.0.attn")):
        if isinstance(schedule, ErrorGated) and unit == "blocks.*":
            continue  # blocks.0 would have to be left out of the cache
        with Cache(CacheConfig(schedule=schedule, sites=(unit,), predictor=Taylor(2))).attach(model) as cache:
            assert torch.equal(run(model), exact)
            report = cache.report()
        assert report["steps_computed"] == STEPS and report["units_skipped"] == report["flops_saved"] == 0


def test_the_network_runs_as_often_as_the_schedule_says():
    model = make("ddt")
    inside = {
        "sublayers": [f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "mlp.w1")],
        "blocks": [f"blocks.{i}.adaln" for i in range(3)],
        "head": ["blocks.1.adaln", "blocks.2.adaln", "final_layer.linear"],
    }
    late = 4  # the null branch joins here, at t = 2 / 3, and starts with a computed value
    for unit, names in inside.items():
        with Cache(CacheConfig(schedule=Explicit((0, 1, 6)), sites=(unit,))).attach(model) as cache:
            counts = calls_of(model, names)
            run(model)
            assert set(counts) == set(names) and set(counts.values()) == {4}, unit  # 0, 1, 4 (null alone), 6
            report = cache.report()
        assert (report["steps_computed"], report["steps_skipped"]) == (4, STEPS - 4)
        cached = len(cache._sites)
        assert report["units_computed"] == cached * (3 + 2)
        assert report["units_skipped"] == cached * (STEPS - 3 + STEPS - late - 2)
        assert report["seconds"] > 0 and report["cache_bytes_peak"] > 0


def flops_of(model):
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):  # the only kernel counted on a CPU
        run(model, guidance_scale=1.0)
    return counted.get_total_flops()


@pytest.mark.parametrize("kind", ["ddt", "improved_dit"])
def test_flops_saved_are_those_that_were_not_made(kind):
    model = make(kind)
    exact = flops_of(model)
    assert exact == 2 * STEPS * model.flops((1, 8, 8))
    for unit in ("sublayers", "blocks", "head"):
        with Cache(CacheConfig(schedule=Uniform(3), sites=(unit,))).attach(model) as cache:
            assert exact - flops_of(model) == cache.report()["flops_saved"] > 0, unit


def test_memory_is_that_of_the_factors():
    model = make()
    for unit, num_tensors in (("sublayers", 6), ("blocks", 1), ("blocks.*", 3)):
        with Cache(CacheConfig(schedule=Uniform(2), sites=(unit,), predictor=Taylor(2))).attach(model) as cache:
            run(model)
            both_branches = 2 * 2 * 16 * 16 * 4  # branches, images, tokens, width, bytes
            assert cache.report()["cache_bytes_peak"] == num_tensors * 3 * both_branches
            assert not cache._stores and cache._bytes == 0


def test_generations_do_not_touch_each_other():
    model = make("ddt")
    exact, config = run(model), CacheConfig(schedule=WarmUp(3, 2), predictor=Taylor(2))
    with Cache(config).attach(model) as cache:
        first = run(model)
        run(model, seed=1, num_images=3)
        assert torch.equal(run(model), first) and not torch.equal(first, exact)
        stopped = [run_and_stop(model, step) for step in (1, 5)]
        assert stopped == [1, 5] and cache.at is None and not cache._stores
        assert torch.equal(run(model), first)
    assert torch.equal(run(model), exact)


def run_and_stop(model, at):
    with pytest.raises(Cancelled) as caught:
        run(model, on_step=lambda info, x: info.step != at)
    return caught.value.step


def test_an_exception_inside_the_network_leaves_the_model_as_it_was():
    model = make()
    exact = run(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook = model.blocks[1].mlp.w2.register_forward_hook(fail_at(4))
    with pytest.raises(RuntimeError, match="in the middle"), Cache(CacheConfig(schedule=Uniform(2))).attach(model):
        run(model)
    hook.remove()
    assert torch.equal(run(model), exact) and not model.attached
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def fail_at(call):
    calls = Counter()

    def hook(*_):
        calls["n"] += 1
        if calls["n"] == call:
            raise RuntimeError("in the middle")

    return hook


class Alone:
    """A model that does not share its calls with another branch."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)


@pytest.mark.parametrize("kind", ["ddt", "improved_dit"])
@pytest.mark.parametrize(
    "schedule", [WarmUp(4, 2), ErrorGated(0.4, "blocks.0", max_skips=3)], ids=["fixed", "error_gated"]
)
@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=["euler", "heun"])
def test_stacked_and_separate_branches_give_the_same_images(kind, schedule, solver):
    model = make(kind)
    condition, path = Condition(labels=torch.tensor([0, 2])), LinearPath()
    found = []
    for wrap in (lambda m: m, Alone):
        branches = {"cond": Branch(wrap(model), condition), "null": Branch(wrap(model), model.null(condition))}
        guided = Guided(branches, classifier_free(2.0, Interval(0.0, 0.7)), path=path)
        x = Draws(0).normal("x", (1, 8, 8), range(2))
        with Cache(CacheConfig(schedule=schedule, predictor=Newton(2))).attach(model) as cache, torch.no_grad():
            found.append(integrate(solver, guided, x, TimeGrid(STEPS).times(), path=path))
            assert cache.report()["units_skipped"] > 0
    torch.testing.assert_close(*found, rtol=0, atol=1e-5 * float(found[0].abs().max()))


def test_each_evaluation_of_a_heun_step_has_its_own_history():
    """Features linear in the step, another line for each stage: both are forecast exactly."""
    model = make()
    head = model.final_layer
    config = CacheConfig(schedule=Uniform(3), sites=("final_layer",), predictor=Taylor(1))
    lines = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    x, now = torch.zeros(2, 3, 4), [0, 0]
    head.forward = lambda *_: (lines[now[1], 0] + now[0] * lines[now[1], 1]).expand(2, 3, 4)
    with Cache(config).attach(model) as cache:
        for step in range(9):
            for stage in (0, 1):
                now[:] = step, stage
                cache.before_step(StepInfo(step, stage, 9), ("cond", "null"))
                out = head(x)
                if step >= 3:
                    line = (lines[stage, 0] + step * lines[stage, 1]).expand(2, 3, 4)
                    torch.testing.assert_close(out, line, rtol=1e-5, atol=1e-5)
        assert cache.report()["sites"]["final_layer"] == {"computed": 2 * 2 * 3, "skipped": 2 * 2 * 6}


def test_heun_computes_both_evaluations_of_a_scheduled_step():
    model = make("ddt")
    with Cache(CacheConfig(schedule=Uniform(4), sites=("blocks.2",))).attach(model) as cache:
        run(model, solver=Heun(), guidance_scale=1.0)
        # steps 0, 4, 8 twice; of the others the last one has one evaluation
        assert cache.report()["sites"]["blocks.2"] == {"computed": 6, "skipped": 2 * STEPS - 1 - 6}


def test_encoder_sites_wait_for_the_next_refresh():
    model = make("ddt")
    with Cache(CacheConfig(schedule=Uniform(3), sites=("blocks.*",))).attach(model) as cache:
        counts = calls_of(model, [f"blocks.{i}.attn" for i in range(3)])
        run(model, refresh_every=2, guidance_scale=1.0)
        # refreshes 0 2 4 6 8 10, scheduled 0 3 6 9: the encoder is computed at 0, 4 (for 3), 6 and 10 (for 9)
        assert counts == {"blocks.0.attn": 4, "blocks.1.attn": 4, "blocks.2.attn": 4}
        sites = cache.report()["sites"]
        assert sites["blocks.0"] == {"computed": 4, "skipped": 2}
        assert sites["blocks.2"] == {"computed": 4, "skipped": STEPS - 4}


def test_another_batch_or_token_count_starts_anew():
    model = make()
    head, seen = model.final_layer, []
    head.forward = lambda x, *_: seen.append(tuple(x.shape)) or x
    config = CacheConfig(schedule=Explicit((0, 1)), sites=("final_layer",), predictor=Taylor(1))
    with Cache(config).attach(model) as cache:
        for step, shape in enumerate([(2, 3, 4), (2, 3, 4), (2, 5, 4), (2, 5, 4), (4, 5, 4), (4, 5, 4)]):
            cache.before_step(StepInfo(step, 0, 8), ("cond", "null"))
            out = head(torch.full(shape, float(step)))
            assert out.shape == shape
        # at order 0 the last computed value comes back, as it was
        assert seen == [(2, 3, 4), (2, 3, 4), (2, 5, 4), (4, 5, 4)] and torch.equal(out, torch.full((4, 5, 4), 4.0))
        cache.before_step(StepInfo(6, 0, 8), ("cond", "null"))
        with pytest.raises(ValueError, match="zip"):
            head(torch.zeros(1, 5, 4))


def test_error_gating_needs_an_indicator_that_runs_first():
    model = make("ddt")
    for threshold, most in ((0.0, STEPS), (1e9, 4)):
        config = CacheConfig(schedule=ErrorGated(threshold, "blocks.0", max_skips=4, first=1, last=1))
        with Cache(config).attach(model) as cache:
            assert "blocks.0.attn" not in cache.report()["sites"]
            run(model, guidance_scale=1.0)
            assert cache.report()["steps_computed"] == most  # 0, 5, 10, 11 where nothing but the limits counts
    late = CacheConfig(schedule=ErrorGated(0.1, "blocks.2"), sites=("blocks.1",))
    with (
        pytest.raises(ValueError, match=r"blocks\.2 has not run before blocks\.1 in step 0"),
        Cache(late).attach(model),
    ):
        run(model)
    with pytest.raises(ValueError, match="all lie in the indicator"):
        Cache(CacheConfig(schedule=ErrorGated(indicator="blocks.1"), sites=("blocks.1.*",))).attach(model)


def features_of(model, site):
    """(branches, steps, ...) of an uncached run without guidance."""
    kept = []
    hook = model.get_submodule(site).register_forward_hook(lambda module, args, out: kept.append(out.clone()))
    run(model, guidance_scale=1.0)
    hook.remove()
    return torch.stack(kept)


def test_measured_errors_and_tables_are_those_of_the_features():
    model = make()
    features = features_of(model, "blocks.1")
    distance = torch.stack([(features - f).abs().flatten(1).sum(1) for f in features]).double().triu()
    unguided = {"guidance_scale": 1.0}
    error = measure(model, lambda: run(model, **unguided), ["blocks.1"])
    torch.testing.assert_close(error, distance, rtol=1e-5, atol=1e-5)
    near = measure(model, lambda: run(model, **unguided), ["blocks.1"], window=4)
    apart = torch.ones(STEPS, STEPS).triu(4).bool()
    assert near[apart].isinf().all() and torch.equal(near[~apart], error[~apart])
    cosine = measure(model, lambda: run(model, **unguided), ["blocks.1"], metric="cosine")
    similarity = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    torch.testing.assert_close(cosine, (1 - similarity).sum((2, 3)).double().triu(1), rtol=1e-4, atol=1e-4)

    steps = DynamicProgramming(4, near, max_length=4).steps(STEPS)
    assert steps == dynamic_programming(segment_costs(error), 4, max_length=4)[0]
    tables = calibrate(model, lambda: [run(model, **unguided) for _ in range(2)], ["blocks.1"], steps)
    assert set(tables) == {("blocks.1", 0)}
    a, b = tables["blocks.1", 0]
    for step in range(STEPS):
        head = features[max(s for s in steps if s <= step)]
        x, y = (value.double().flatten(0, 1) for value in (head, features[step]))
        slope = ((x - x.mean(0)) * (y - y.mean(0))).mean(0) / x.var(0) if step not in steps else torch.ones(16)
        n = len(x)
        scale = (2 * n - 1) / (2 * n) / ((n - 1) / n) if step not in steps else 1  # the official n - 1, of 2 n values
        torch.testing.assert_close(a[step].double(), slope.double() * scale, rtol=1e-4, atol=1e-4)
        if step in steps:
            assert (b[step] == 0).all()
    config = CacheConfig(schedule=Explicit(steps), sites=("blocks.1",), predictor=Affine(tables))
    with Cache(config).attach(model) as cache:
        run(model, **unguided)
        assert cache.report()["units_skipped"] == STEPS - 4


def test_what_cannot_be_measured_is_refused():
    model = make("ddt")
    with pytest.raises(ValueError, match="must compute every site in every step"):
        measure(model, lambda: run(model, refresh_every=2), ["state"])
    with pytest.raises(ValueError, match="must compute every site"):
        measure(model, lambda: None, ["state"])
    with pytest.raises(ValueError, match="metric must be one of"):
        measure(model, lambda: run(model), ["state"], metric="l3")
    with pytest.raises(ValueError, match="window must be at least 1"):
        measure(model, lambda: run(model), ["state"], window=0)
    assert not model.attached


# On real digits ----------------------------------------------------------------------------------------------------


@memoize
def digits():
    return load("ddt-digits").model


@memoize
def drawn(num_steps=50, seed=5, num_images=16):
    return run(digits(), num_steps=num_steps, seed=seed, num_images=num_images, guidance_scale=1.5)


def deviation(config, seed=5):
    """Mean squared distance of 16 cached images to the exact ones."""
    with Cache(config).attach(digits()):
        images = run(digits(), num_steps=50, seed=seed, num_images=16, guidance_scale=1.5)
    return float((images - drawn(seed=seed)).square().mean())


@pytest.mark.parametrize("interval", [3, 4, 5, 6])
def test_forecasts_beat_reuse_and_fewer_steps_on_digits(interval):
    schedule = WarmUp(interval, 2)
    reuse, line, curve = (
        deviation(CacheConfig(schedule=schedule, predictor=p)) for p in (Taylor(0), Taylor(1), Newton(2))
    )
    fewer = float((drawn(len(schedule.steps(50))) - drawn()).square().mean())
    # measured: 0.04-0.12 and 0.03-0.16, and Newton's second order at 0.30-0.59 of the line
    assert line <= 0.4 * reuse and line <= 0.3 * fewer and curve <= line


def test_correction_brings_reuse_closer_on_digits():
    """The encoder's last block, groups of about 8 steps, tables from other seeds (measured: 0.71 of plain reuse)."""
    model = digits()
    error = measure(model, lambda: run(model, num_steps=50, seed=100, guidance_scale=1.5), ["blocks.3"], window=16)
    schedule = CacheQuant(8, error)
    costs, steps = segment_costs(torch.tensor(schedule.error)), schedule.steps(50)
    even = uniform_budget(50, len(steps))
    total = [sum(float(costs[a, b]) for a, b in zip(s, (*s[1:], 50))) for s in (steps, even)]
    assert total[0] < total[1]

    def calibration():
        return run(model, num_steps=50, seed=101, num_images=32, guidance_scale=1.5)

    tables = calibrate(model, calibration, ["blocks.3"], steps)
    plain, corrected = (
        deviation(CacheConfig(schedule=schedule, sites=("blocks.3",), predictor=p)) for p in (Reuse(), Affine(tables))
    )
    assert corrected <= 0.85 * plain
