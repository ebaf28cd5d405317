"""Encoder sharing: forecasts on stubs that have exact ones, their budget and branches, probes, reports and plans."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.behaviour.test_pipeline import make
from untwine.acceleration.sharing.plan import SharingPlan, make_plan, model_hash
from untwine.acceleration.sharing.probe import gram, similarity, velocity_error
from untwine.acceleration.sharing.report import compare, part_flops
from untwine.contracts import Condition, EncoderState, Output, StepInfo
from untwine.diffusion.draws import Draws
from untwine.diffusion.forecast import Forecast, lagrange_weights
from untwine.diffusion.guidance import Branch, Guided, classifier_free
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import Cancelled, Sampling, integrate, sample
from untwine.diffusion.solvers import AdamsBashforth, Euler, Heun
from untwine.diffusion.timesteps import TimeGrid

REFRESH = (0, 2, 5, 6, 9, 13)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.02, 0.3), min_size=1, max_size=4), st.floats(0.0, 1.0))
def test_weights_sum_to_one_and_reproduce_polynomials(gaps, u):
    nodes = torch.tensor(gaps, dtype=torch.float64).cumsum(0).tolist()
    weights = lagrange_weights(nodes, u)
    scale = sum(map(abs, weights))
    assert abs(sum(weights) - 1) < 1e-9 * scale
    for degree in range(len(nodes)):
        assert abs(sum(w * n**degree for w, n in zip(weights, nodes)) - u**degree) < 1e-9 * scale


@pytest.mark.parametrize("order", range(4))
def test_order_grows_with_the_refreshes(order):
    """After k refreshes a polynomial of degree min(k - 1, order) is exact, and one of the next degree is not."""
    forecast, nodes = Forecast(order), [1.0, 0.8, 0.7, 0.45, 0.3, 0.2]
    x = Draws(0).normal("x", (4, 3), [0, 1]).double()

    def value(u: float, degree: int) -> torch.Tensor:
        return sum(x.roll(k, 0) * u**k for k in range(degree + 1))

    for degree in range(order + 2):
        forecast = Forecast(order)
        for seen, u in enumerate(nodes, 1):
            forecast.add(("a",), u, [value(u, degree).float()])
            (found,) = forecast.at(("a",), u - 0.15)
            error = (found - value(u - 0.15, degree)).abs().max() / x.abs().max()
            assert (error < 1e-5) == (degree <= min(seen - 1, order)), (degree, seen, error)


class Polynomial:
    """Modulations and state are polynomials of degree 2 in t, whatever x; the decoder hands them on."""

    decoupled, predicts, accepts = True, "velocity", frozenset({"labels"})

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.given: list[torch.Tensor] = []

    def exact(self, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        t, y = t.float().view(-1, 1), labels.float().view(-1, 1)
        return torch.cat([1 + y * t - t**2, 2 * t**2 - y, y + 0 * t], 1)

    def encode(self, x, t, condition):
        self.calls.append("encode")
        tokens = self.exact(t, condition.labels)
        return EncoderState(tokens, tokens - t.view(-1, 1), t)

    def modulation_bytes(self, state):
        return 2 * state.tokens.nbytes

    def modulate(self, state):
        self.calls.append("modulate")
        return replace(state, modulations=(3 * state.tokens - 1, 2 * state.tokens))

    def decode(self, x, state, retime=None):
        tokens = state.tokens if retime is None else state.hidden + retime.view(-1, 1)
        self.calls.append("decode" if state.modulations is None else "decode, given")
        first, second = state.modulations or (3 * tokens - 1, 2 * tokens)
        self.given.append(second.clone())  # what is handed in is valid for this call
        return Output(first - second - 0.5 * x)

    def null(self, condition):
        return Condition(labels=torch.full_like(condition.labels, 7))


def generate(model, refresh, solver=None, weights=None, steps=16, shift=2.0, **options):
    labels = torch.tensor([1, 2])
    branches = {
        "cond": Branch(model, Condition(labels=labels)),
        "null": Branch(model, model.null(Condition(labels=labels))),
    }
    guided = Guided(branches, weights or classifier_free(1.5), path=LinearPath(), **options)
    x, grid = Draws(0).normal("x", (3,), range(2)), TimeGrid(steps, shift=shift).times()
    return integrate(solver or Euler(), guided, x, grid, path=LinearPath(), refresh=refresh), guided


@pytest.mark.parametrize("solver", [Euler(), Heun(), Heun(reuse=True), AdamsBashforth(3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"modulation_budget": 0}, {"retime": True}], ids=str)
def test_forecast_of_a_polynomial_state_is_exact(solver, options):
    """From the third refresh on, at every evaluation's own t, Heun's corrector included."""
    model, refresh, times = Polynomial(), (0, 1, 2, 4, 8), []

    def weights(at: StepInfo, t: float):
        times.append((at.step, t))  # a refresh looks ahead and asks for the evaluations after it as well
        return {"cond": 1.5, "null": -0.5}

    _, guided = generate(model, refresh, solver, weights=weights, order=2, **options)
    evaluations = list(dict.fromkeys(times))
    assert len(model.given) == guided.num_evaluations // 2 == len(evaluations)
    labels = torch.tensor([1, 2, 7, 7])
    errors = [
        float((given - 2 * model.exact(torch.full((4,), t), labels)).abs().max())
        for given, (step, t) in zip(model.given, evaluations)
        if step >= 3
    ]
    assert max(errors) < 1e-4
    assert guided.num_refreshes == 2 * len(refresh)
    assert sum(call == "encode" for call in model.calls) == len(refresh)


def test_budget_decides_what_is_extrapolated_and_not_what_comes_out():
    rich, poor = Polynomial(), Polynomial()
    a, with_cache = generate(rich, REFRESH, order=2)
    b, without = generate(poor, REFRESH, order=2, modulation_budget=0)
    assert torch.allclose(a, b, atol=1e-5)
    assert rich.calls.count("modulate") == len(REFRESH) and "decode" not in rich.calls
    assert "modulate" not in poor.calls and "decode, given" not in poor.calls
    assert (with_cache.num_modulations, without.num_modulations) == (2 * len(REFRESH), 2 * 16)
    assert with_cache.cache_bytes > without.cache_bytes > 0


def test_budget_gives_one_answer_for_a_generation_whose_branches_change():
    """Room for one branch and not for two: the history stays of one kind when the second appears."""
    room = (1 + 4) * 2 * 2 * 3 * 4  # (state + history and output of order 2) x modulations of one branch

    def weights(at: StepInfo, t: float):
        return {"cond": 1.5, "null": -0.5} if at.step >= 6 else {"cond": 1.0}

    model = Polynomial()
    found, _ = generate(model, REFRESH, weights=weights, order=2, modulation_budget=room)
    expected, _ = generate(Polynomial(), REFRESH, weights=weights, order=2)
    assert torch.allclose(found, expected, atol=1e-5)
    assert "modulate" not in model.calls


def test_a_branch_that_appears_later_starts_from_its_own_refresh():
    """And one that was left out by a refresh starts anew."""

    def weights(at: StepInfo, t: float):
        return {"cond": 1.5, "null": -0.5} if 3 <= at.step < 5 or at.step >= 9 else {"cond": 1.0}

    model = Polynomial()
    generate(model, REFRESH, weights=weights, order=1)
    null, times = torch.full((2,), 7), TimeGrid(16, shift=2.0).times()
    for step, source in ((3, 2), (4, 2), (10, 9), (12, 9)):
        assert torch.equal(model.given[step][2:], 2 * model.exact(times[source].expand(2), null))
    assert not torch.allclose(model.given[14][2:], 2 * model.exact(times[13].expand(2), null))


def test_order_zero_is_reuse_bit_for_bit():
    pipe = make()
    settings = replace(pipe.sampling, num_inference_steps=8, refresh=(0, 3, 4), refresh_every=1)
    old = replace(settings, refresh=None)
    run = {"num_images": 2, "output_type": "latent"}
    assert torch.equal(
        pipe(sampling=settings, **run).images,  # type: ignore[union-attr]
        pipe(sampling=old, refresh=(0, 3, 4), **run).images,  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_forecasting_modulations_is_decoding_from_the_extrapolated_state(order):
    model = make().model
    x = Draws(1).normal("x", (1, 8, 12), range(3))
    condition, times = Condition(labels=torch.tensor([0, 1, 2])), [0.9, 0.8, 0.65, 0.5][: order + 1]
    states = [model.modulate(model.encode(x, torch.full((3,), t), condition)) for t in times]
    forecast = Forecast(order)
    for t, state in zip(times, states):
        forecast.add(("cond",), t, state.modulations)
    given = replace(states[-1], modulations=forecast.at(("cond",), 0.45))
    weights = lagrange_weights(times, 0.45)
    tokens = sum(w * state.tokens for w, state in zip(weights, states))
    expected = model.decode(x, EncoderState(tokens, tokens, states[-1].t)).sample
    assert (model.decode(x, given).sample - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_histories_are_float32_whatever_the_model():
    model = make().model.to(torch.bfloat16)
    latents, guided = sample(
        model,
        Condition(labels=torch.tensor([0])),
        (1, 8, 12),
        torch.tensor([0]),
        draws=Draws(0),
        sampling=Sampling(num_inference_steps=6, refresh_every=2, forecast_order=1),
    )
    assert latents.isfinite().all()
    forecast = next(iter(guided._shared.values())).forecast
    assert {value.dtype for value in forecast.at(("cond",), 0.5)} == {torch.float32}


def test_coordinates_agree_on_an_even_grid_only():
    pipe, run = make(), {"num_images": 2, "output_type": "latent"}
    base = replace(pipe.sampling, num_inference_steps=12, refresh=(0, 2, 5, 9), refresh_every=1, forecast_order=2)

    def latents(**changes):
        return pipe(sampling=replace(base, **changes), **run).images  # type: ignore[union-attr]

    assert torch.allclose(latents(), latents(forecast_in="step"), atol=1e-5)
    assert not torch.allclose(latents(shift=3.0), latents(shift=3.0, forecast_in="step"), atol=1e-4)


def test_all_steps_refreshed_is_the_exact_run():
    pipe, run = make(), {"num_images": 2, "output_type": "latent"}
    exact = replace(pipe.sampling, refresh_every=1)
    plan = make_plan(pipe, 6, replace(exact, forecast_order=2), num_images=2)
    assert plan.refresh == tuple(range(6))
    assert torch.equal(pipe(plan=plan, **run).images, pipe(sampling=exact, **run).images)  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", ["ode", "sde"])
def test_noise_and_images_do_not_depend_on_the_batch(rule):
    pipe = make()
    settings = replace(pipe.sampling, solver=Euler(rule), forecast_order=2, retime=True)
    whole = pipe(num_images=4, output_type="latent", sampling=settings).images
    for k in range(4):
        alone = pipe(num_images=1, first_image=k, output_type="latent", sampling=settings).images
        assert (alone - whole[k : k + 1]).abs().max() <= 1e-4 * whole.abs().max()  # type: ignore[index]


def test_stopping_in_the_middle_leaves_nothing():
    pipe = make()
    names = {name: sorted(vars(module)) for name, module in pipe.model.named_modules()}
    run = {"num_images": 2, "output_type": "latent", "sampling": replace(pipe.sampling, forecast_order=2)}
    before = pipe(**run).images
    with pytest.raises(Cancelled):
        pipe(**run, on_step=lambda at, x: at.step < 3)
    with pytest.raises(KeyError):
        pipe(**run, on_step=lambda at, x: {}[at.step] if at.step == 3 else None)
    assert {name: sorted(vars(module)) for name, module in pipe.model.named_modules()} == names
    assert torch.equal(pipe(**run).images, before)  # type: ignore[union-attr]


class Listener:
    """Something attached to a model."""

    def __init__(self) -> None:
        self.heard: list = []

    def before_step(self, at, names):
        self.heard.append((at.step, names))

    def reset(self):
        self.heard.append("reset")


def test_attachments_hear_every_call_and_every_end():
    pipe, listener = make(), Listener()
    pipe.model.attached = [listener]
    pipe(num_images=1, output_type="latent", refresh=(0, 3))
    assert listener.heard[0] == listener.heard[-1] == "reset"
    calls = listener.heard[1:-1]
    # The interval (0, 0.7) of six steps guides from step 2 on; the refresh at 0 serves it and encodes both branches.
    one, two = ("cond",), ("cond", "null")
    assert calls == [(0, two), (0, one), (1, one), (2, two), (3, two), (3, two), (4, two), (5, two)]
    listener.heard.clear()
    with pytest.raises(Cancelled):
        pipe(num_images=1, output_type="latent", on_step=lambda at, x: False)
    assert listener.heard[-1] == "reset"
    with pytest.raises(ValueError, match="something attached"):
        similarity(pipe, pipe.sampling, num_images=1)


def test_similarity_is_the_mean_cosine_and_needs_one_micro_batch():
    states = Draws(0).normal("z", (7, 5), range(4)).transpose(0, 1)
    expected = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
    assert torch.allclose(gram(states, rows=3) / 4, expected.mean(-1).double(), atol=1e-6)
    pipe = make()
    whole = similarity(pipe, pipe.sampling, num_images=4)
    parts = similarity(pipe, replace(pipe.sampling, refresh_every=3, forecast_order=1), num_images=4, micro_batch=1)
    assert torch.allclose(whole, parts, atol=1e-5)  # in parts, and whatever sharing is installed
    assert torch.allclose(whole.diagonal(), torch.ones(6, dtype=torch.float64))
    assert (whole[0, 1:] < 1 - 1e-6).all()


def test_velocity_error_is_what_sharing_does_to_the_next_velocity():
    pipe = make()
    error = velocity_error(pipe, pipe.sampling, num_images=3, micro_batch=2)
    assert torch.equal(error, error.triu(1))
    assert (error[0, 1:] > 0).all()
    # The first reused step of a shared run starts where the exact one is: its step differs by dt times that error.
    states = {}
    for refresh in (None, (0, 2, 3, 4, 5)):
        pipe(
            num_images=3,
            output_type="latent",
            sampling=replace(pipe.sampling, refresh_every=1, refresh=refresh),
            on_step=lambda at, x, key=refresh: states.setdefault((key, at.step), x),
        )
    moved = (states[None, 1] - states[(0, 2, 3, 4, 5), 1]).double().square().mean().sqrt() * 6
    assert float(error[0, 1]) == pytest.approx(float(moved), rel=1e-3)
    ahead = velocity_error(pipe, replace(pipe.sampling, forecast_order=2), num_images=3, spacing=1)
    assert torch.allclose(ahead[0], velocity_error(pipe, pipe.sampling, num_images=3)[0])  # nothing to forecast from
    assert not torch.allclose(ahead[2], error[2])


def test_dynamic_programming_is_never_worse_than_any_other_choice():
    pipe = make()
    error = velocity_error(pipe, pipe.sampling, num_images=2)
    for budget in (1, 2, 3, 5, 6):
        plan = make_plan(pipe, budget, pipe.sampling, cost="velocity", errors={"velocity": error})
        costs = []
        for chosen in combinations(range(1, 6), budget - 1):
            bounds = [0, *chosen, 6]
            costs.append(sum(float(error[a, a:b].sum()) for a, b in pairwise(bounds)))
        assert plan.cost == pytest.approx(min(costs), abs=1e-9)


def test_report_counts_work_that_adds_up():
    pipe = make()
    parts = part_flops(pipe)
    assert parts.encode + parts.modulate + parts.decode == pipe.model.flops(pipe.latent_shape)
    shared = replace(pipe.sampling, refresh_every=3, forecast_order=1)
    rows = compare(pipe, {"shared": shared}, num_images=2, seeds=(0, 1))
    row, exact = rows["shared"], rows["exact"]
    assert (row["refreshed"], row["reused"], exact["refreshed"], exact["reused"]) == (2, 4, 6, 0)
    assert (row["encoder_passes"], exact["encoder_passes"]) == (4, 10)
    assert exact["drift"] == exact["drift_median"] == 0 < row["drift"]
    assert row["flops"] == 4 * (parts.encode + parts.modulate) + 10 * parts.decode
    assert row["flops_saved"] == pytest.approx(1 - row["flops"] / exact["flops"])
    assert row["cache_bytes"] > exact["cache_bytes"] > 0
    assert row["seconds"] > 0


@pytest.fixture(scope="module")
def planned():
    pipe = make()
    return pipe, make_plan(pipe, 2, replace(pipe.sampling, forecast_order=1), num_images=2)


def test_plan_survives_its_file(planned, tmp_path):
    pipe, plan = planned
    plan.save(tmp_path / "plan.json")
    assert SharingPlan.load(tmp_path / "plan.json") == plan
    run = {"num_images": 2, "output_type": "latent"}
    expected = pipe(sampling=plan.sampling, **run).images
    for form in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert torch.equal(pipe(plan=form, **run).images, expected)
    assert pipe.last_run["encoder_passes"] < 2 * len(plan.refresh) + 1
    assert torch.equal(pipe(plan=plan, sampling=replace(pipe.sampling, refresh_every=1), **run).images, expected)
    assert set(plan.made["drift_of_candidates"]) == {"uniform", "similarity", "velocity"}


OTHERS = {
    "steps": ({"num_inference_steps": 7}, "num_inference_steps = 6, and the sampler has num_inference_steps = 7"),
    "guidance": ({"guidance_scale": 3.0}, "guidance_scale = 2.0, and the sampler has guidance_scale = 3.0"),
    "refresh too": ({"refresh": (0, 1)}, "give refresh or plan, not both"),
}
OTHER_SETTINGS = {
    "shift": ({"shift": 2.0}, "shift = 1.0, and the sampler has shift = 2.0; set shift to 1.0, or make a plan"),
    "last step": ({"last_step": 0.1}, "last_step = None, and the sampler has last_step = 0.1"),
    "interval": ({"guidance_interval": None}, r"guidance_interval = \[0.0, 0.7\], and .* = None"),
    "solver": ({"solver": Heun()}, "solver = .*euler.*, and the sampler has solver = .*heun"),
    "order": ({"forecast_order": 3}, "forecast_order = 1, and the sampler has forecast_order = 3"),
}


@pytest.mark.parametrize("request_, message", OTHERS.values(), ids=OTHERS)
def test_plan_refuses_another_request(planned, request_, message):
    pipe, plan = planned
    with pytest.raises(ValueError, match=message):
        pipe(plan=plan, **request_)


@pytest.mark.parametrize("changes, message", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_plan_refuses_another_sampler(planned, changes, message):
    pipe, plan = planned
    with pytest.raises(ValueError, match=message):
        pipe(plan=plan, sampling=replace(pipe.sampling, refresh_every=1, **changes))


def test_plan_refuses_another_model(planned):
    plan, other = planned[1], make()
    other.model.to(torch.bfloat16)
    other(plan=plan, num_images=1, output_type="latent")  # the same weights, rounded
    with torch.no_grad():
        other.model.blocks[1].mlp.w2.weight[0, 0] += 1
    with pytest.raises(
        ValueError, match=f"weights {plan.model[:12]}, and this model's are {model_hash(other.model)[:12]}"
    ):
        other(plan=plan)


def test_plan_file_that_is_none(tmp_path):
    for text in ("", "[]", "{}", '{"sampling": {"steps": 3}, "model": "x"}', '{"sampling": {}, "model": "x"}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json is no sharing plan: .*make one with untwine accelerate"):
            SharingPlan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="is no sharing plan"):
        SharingPlan.load(tmp_path / "missing.json")


BAD = {
    "order": (lambda: Sampling(forecast_order=4), r"order must be 0 \(reuse\), 1, 2 or 3, got 4"),
    "negative order": (lambda: Sampling(forecast_order=-1), "got -1"),
    "true is no order": (lambda: Sampling(forecast_order=True), "got True"),
    "late refresh": (lambda: Sampling(num_inference_steps=5, refresh=(0, 5)), r"refresh names steps \[5\] outside"),
    "no first refresh": (lambda: Sampling(refresh=(1,)), "must contain the first step"),
    "nothing to forecast": (
        lambda: make()(sampling=Sampling(forecast_order=1)),
        "act between refreshes, and here every step is one; set refresh_every or refresh",
    ),
    "no budget": (lambda: make_plan(make(), 0, Sampling()), r"budget must be within \[1, num_steps = 50\]"),
    "large budget": (lambda: make_plan(make(), 51, Sampling()), "got 51"),
    "cost": (lambda: make_plan(make(), 5, Sampling(), cost="speed"), "cost must be .*got 'speed'"),  # type: ignore
    "no encoder": (lambda: make_plan(make("ImprovedDiT"), 5, Sampling()), "ImprovedDiT has no encoder state"),
    "no images": (lambda: similarity(make(), Sampling(), num_images=0), "num_images must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("make_, message", BAD.values(), ids=BAD)
def test_bad_values_name_the_argument(make_, message):
    with pytest.raises(ValueError, match=message):
        make_()
