"""Every registered path, time draw and solver keeps its contract; guidance and the driver keep theirs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from untwine.contracts import Condition, EncoderState, Output, StepInfo
from untwine.diffusion import PATHS, SOLVERS, TIME_DRAWS
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import Branch, Guided, Interval, classifier_free
from untwine.diffusion.paths import CosinePath, LinearPath
from untwine.diffusion.sampling import Cancelled, Sampling, integrate, sample
from untwine.diffusion.solvers import DDIM, AdamsBashforth, AncestralDDPM, Euler, Heun, adams_weights
from untwine.diffusion.timesteps import TimeGrid, dimension_shift, discrete_grid, shift_time
from untwine.testing import check_path, check_solver, check_time_draw


@pytest.mark.parametrize("name", PATHS)
def test_paths(name):
    check_path(PATHS[name]())


@pytest.mark.parametrize("name", TIME_DRAWS)
def test_time_draws(name):
    check_time_draw(TIME_DRAWS[name]())


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name):
    check_solver(SOLVERS[name]())


VARIANTS = [
    (Heun(), 2),
    (Heun(reuse=True), 1),
    (AdamsBashforth(1), 1),
    (AdamsBashforth(2), 2),
    (AdamsBashforth(3), 2),  # the first steps are of lower order
    (AdamsBashforth(2, "log_snr"), None),
    (Euler("sde"), None),
    (Euler("preserve"), None),
    (DDIM(eta=0.5), None),
    (AncestralDDPM("large"), None),
]


@pytest.mark.parametrize(("solver", "order"), VARIANTS, ids=str)
def test_solver_variants(solver, order):
    check_solver(solver, order=order)


def test_solvers_on_another_path():
    check_solver(Heun(), order=2, path=CosinePath())
    check_solver(DDIM(), order=1, path=CosinePath())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 0.3), min_size=2, max_size=5))
def test_multistep_weights_integrate_polynomials_exactly(gaps):
    t = torch.tensor(gaps, dtype=torch.float64).cumsum(0)
    nodes, start, end = t[:-1], t[-2], t[-1]
    weights = adams_weights(nodes, start, end)
    assert abs(sum(weights) - 1) < 1e-9
    for degree in range(len(nodes)):
        mean = (end ** (degree + 1) - start ** (degree + 1)) / ((degree + 1) * (end - start))
        found = sum(w * n**degree for w, n in zip(weights, nodes))
        assert abs(found - mean) < 1e-6 * max(map(abs, weights))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 60),
    st.floats(0.2, 8.0),
    st.one_of(st.none(), st.floats(0.01, 0.5)),
)
def test_grids_fall_from_noise_to_data(num_steps, shift, last_step):
    times = TimeGrid(num_steps, shift, last_step).times()
    assert times.shape == (num_steps + 1,)
    assert times.dtype == torch.float64
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    if num_steps > 1:
        assert times[0] == 1


def test_shift_agrees_between_grid_and_draw():
    grid = TimeGrid(20, shift=3.0).times()
    assert torch.allclose(grid, shift_time(TimeGrid(20).times(), 3.0), atol=1e-6)
    assert dimension_shift((4, 32, 32)) == 1.0
    assert dimension_shift((768, 16, 16)) == pytest.approx(6.93, abs=0.01)


def test_discrete_grid_hits_levels():
    path = PATHS["discrete"]()
    grid = discrete_grid(1000, 10)
    assert path.levels(grid).tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0, -1]
    exact = path.at(grid).alpha
    assert torch.allclose(path.at(grid.float()).alpha, exact.float(), atol=1e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.699, 0.0, 0.7])
def test_interval_ends_are_open_unless_closed(t):
    assert (t in Interval(0.0, 0.7)) == (0 < t < 0.7)
    assert t in Interval(0.0, 0.7, closed=True)


def test_interval_decides_on_the_published_grid():
    """t = 0.3 of the published direction is a grid point of 50 steps and is not guided in (0.3, 1)."""
    grid = TimeGrid(50).times()
    progress = (1 - grid).float()
    inside = [float(t) in Interval(0.0, 0.7) for t in grid]
    assert inside == [bool(0.3 < p < 1.0) for p in progress]


class Toy:
    """A decoupled network that counts what it is asked."""

    decoupled, predicts, accepts = True, "velocity", frozenset({"labels"})

    def __init__(self, size: float = 1.0) -> None:
        self.size, self.encoded, self.decoded, self.modulated = size, 0, 0, 0

    def encode(self, x, t, condition):
        self.encoded += len(x)
        tokens = torch.tanh(x * self.size + t.view(-1, 1) - 0.1 * condition.labels.view(-1, 1))
        return EncoderState(tokens, tokens, t)

    def modulation_bytes(self, state):
        return state.tokens.numel() * 4

    def modulate(self, state):
        self.modulated += len(state.tokens)
        return state

    def decode(self, x, state):
        self.decoded += len(x)
        return Output(0.7 * state.tokens - 0.3 * x)

    def null(self, condition):
        return Condition(labels=torch.full_like(condition.labels, 9))


class NaiveCFG:
    """Both branches at every evaluation, as the published samplers do; the reference for skipping."""

    def __init__(self, net, labels, scale, interval):
        self.net, self.labels, self.scale, self.interval, self.state = net, labels, scale, interval, None

    def __call__(self, x, t, at):
        from untwine.contracts import Prediction

        both = torch.cat([x, x])
        labels = torch.cat([self.labels, torch.full_like(self.labels, 9)])
        if at.refresh:
            self.state = self.net.encode(both, t.float().expand(len(both)), Condition(labels=labels))
        cond, null = self.net.decode(both, self.state).sample.chunk(2)
        scale = self.scale if float(t) in self.interval else 1.0
        return Prediction(null + scale * (cond - null), "velocity", x, t, LinearPath())


@pytest.mark.parametrize("solver", [Euler(), Heun(), Heun(reuse=True), AdamsBashforth(3)], ids=str)
@pytest.mark.parametrize("refresh", [None, (0, 3, 4, 9), range(0, 12, 4)], ids=str)
def test_skipping_branches_changes_nothing(solver, refresh):
    x, labels = Draws(0).normal("x", (5,), range(3)), torch.tensor([1, 2, 3])
    interval, grid = Interval(0.2, 0.7), TimeGrid(12).times()
    ours, naive = Toy(), Toy()
    guided = Guided(
        {"cond": Branch(ours, Condition(labels=labels)), "null": Branch(ours, ours.null(Condition(labels=labels)))},
        classifier_free(2.5, interval),
        path=LinearPath(),
    )
    a = integrate(solver, guided, x, grid, path=LinearPath(), refresh=refresh)
    b = integrate(solver, NaiveCFG(naive, labels, 2.5, interval), x, grid, path=LinearPath(), refresh=refresh)
    assert torch.allclose(a, b, atol=1e-6)
    assert ours.decoded < naive.decoded
    assert ours.encoded <= naive.encoded
    assert guided.num_evaluations * 3 == ours.decoded
    assert guided.num_refreshes * 3 == ours.encoded
    assert (ours.modulated > 0) == (refresh is not None)


def test_budget_turns_modulation_off():
    net, labels = Toy(), torch.tensor([1])
    guided = Guided(
        {"cond": Branch(net, Condition(labels=labels))},
        lambda at, t: {"cond": 1.0},
        path=LinearPath(),
        modulation_budget=0,
    )
    integrate(Euler(), guided, torch.ones(1, 5), TimeGrid(4).times(), path=LinearPath(), refresh=[0])
    assert net.modulated == 0
    assert net.encoded == 1


def test_scale_one_runs_one_branch():
    net, labels = Toy(), torch.tensor([1, 2])
    branches = {"cond": Branch(net, Condition(labels=labels)), "null": Branch(net, net.null(Condition(labels=labels)))}
    guided = Guided(branches, classifier_free(1.0), path=LinearPath())
    integrate(Euler(), guided, torch.ones(2, 5), TimeGrid(4).times(), path=LinearPath())
    assert guided.num_evaluations == 4


def test_autoguidance_and_negative_conditions_are_weight_tables():
    strong, weak, labels = Toy(1.0), Toy(0.5), torch.tensor([4])
    branches = {
        "cond": Branch(strong, Condition(labels=labels)),
        "weak": Branch(weak, Condition(labels=labels)),
        "negative": Branch(strong, Condition(labels=labels + 1)),
    }
    x, at, t = torch.ones(1, 5), StepInfo(0, 0, 1), torch.tensor(0.5, dtype=torch.float64)
    weights = {"cond": 2.0, "weak": -0.75, "negative": -0.25}
    found = Guided(branches, lambda at, t: weights, path=LinearPath())(x, t, at).value
    expected = sum(
        w * b.model.decode(x, b.model.encode(x, t.float().expand(1), b.condition)).sample
        for w, b in zip(weights.values(), branches.values())
    )
    assert torch.allclose(found, expected, atol=1e-6)


def test_sharing_without_a_state_is_refused():
    class Plain:
        decoupled, predicts, accepts = False, "velocity", frozenset()

    with pytest.raises(ValueError, match="Plain has no encoder state"):
        sample(Plain(), Condition(), (1, 4, 4), torch.arange(2), draws=Draws(0), sampling=Sampling(refresh_every=2))


def test_driver_projects_reports_and_cancels():
    data_seen = []
    known = torch.tensor([[True, False, False]])

    def denoise(x, t, at):
        from untwine.contracts import Prediction

        return Prediction(torch.ones_like(x), "velocity", x, t, LinearPath())

    def project(x, at):
        return torch.where(known, torch.full_like(x, 7.0), x)

    grid = TimeGrid(5).times()
    out = integrate(
        Euler(),
        denoise,
        torch.zeros(1, 3),
        grid,
        path=LinearPath(),
        project=project,
        on_step=lambda at, x: data_seen.append(at.step),
    )
    assert data_seen == [0, 1, 2, 3, 4]
    assert out.tolist() == [[7.0, pytest.approx(-1.0), pytest.approx(-1.0)]]
    with pytest.raises(Cancelled) as stopped:
        integrate(Euler(), denoise, torch.zeros(1, 3), grid, path=LinearPath(), on_step=lambda at, x: at.step < 2)
    assert stopped.value.step == 2
    half = integrate(Euler(), denoise, torch.zeros(1, 3), grid, path=LinearPath(), stop=2)
    rest = integrate(Euler(), denoise, half, grid, path=LinearPath(), start=2)
    assert torch.allclose(rest, torch.full((1, 3), -1.0))


BAD = [
    (lambda: TimeGrid(0), "num_steps must be an integer >= 1, got 0"),
    (lambda: TimeGrid(2.5), "num_steps"),
    (lambda: TimeGrid(True), "num_steps"),
    (lambda: TimeGrid(5, shift=0.0), "shift"),
    (lambda: TimeGrid(5, last_step=0.0), "last_step"),
    (lambda: Interval(0.7, 0.3), "guidance_interval must be increasing within"),
    (lambda: Interval(-0.1, 0.3), "guidance_interval"),
    (lambda: classifier_free(float("nan")), "guidance_scale must be a finite number"),
    (lambda: classifier_free(-1.0), "guidance_scale"),
    (lambda: AdamsBashforth(5), "order must be 1, 2, 3 or 4"),
    (lambda: DDIM(eta=2.0), "eta must be within"),
    (lambda: Sampling(num_inference_steps=-3), "num_inference_steps"),
    (lambda: Sampling(guidance_interval=(0.8, 0.3)), "guidance_interval must be increasing"),
    (lambda: Sampling(num_inference_steps=5, refresh_every=6), "refresh_every must be within"),
    (lambda: discrete_grid(10, 11), "num_steps must be within"),
    (lambda: Draws(-1), "seed must be an integer"),
    (lambda: integrate(Euler("sde"), None, torch.zeros(1), TimeGrid(2).times(), path=LinearPath()), "pass noise"),
    (
        lambda: integrate(Euler(), None, torch.zeros(1), TimeGrid(2).times(), path=LinearPath(), refresh=[1]),
        "first step",
    ),
    (
        lambda: integrate(Euler(), None, torch.zeros(1), TimeGrid(2).times(), path=LinearPath(), refresh=[0, 5]),
        "outside",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=range(len(BAD)))
def test_bad_values_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
