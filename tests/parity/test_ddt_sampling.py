"""DDT's samplers, time grids, path coefficients and multistep weights against the official code's numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.parity.cases import cases
from untwine.contracts import Batch, Condition, EncoderState, Output
from untwine.diffusion.guidance import Branch, Guided, Interval, classifier_free
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import integrate
from untwine.diffusion.solvers import AdamsBashforth, Euler, Heun, adams_weights
from untwine.diffusion.timesteps import LogitNormalTime, TimeGrid, UniformTime
from untwine.models.ddt import DDT
from untwine.models.dit import ImprovedDiT
from untwine.training.objectives.flow_matching import FlowMatching

NODES = {"t2logsnr": "log_snr", "t2snr": "snr", "t2isnr": "inverse_snr"}


class ClosedForm:
    """The closed-form network of the case, in untwine's time, split into encode and decode.

    Its decoder also reads the current time, which :meth:`denoiser` passes on the side.
    """

    decoupled = True
    predicts = "velocity"

    def __init__(self) -> None:
        self.now = 0.0
        self.num_encoded: list[int] = []

    def encode(self, x, t, condition) -> EncoderState:
        tb = (1 - t).view(-1, 1, 1, 1)
        yb = condition.labels.float().view(-1, 1, 1, 1)
        self.num_encoded.append(x.shape[0])
        return EncoderState(torch.tanh(0.7 * x + 1.3 * tb - 0.2 * yb), yb, t)

    def decode(self, x, state) -> Output:
        tb = torch.tensor(1 - self.now)
        v = 0.6 * state.tokens - 0.4 * x * torch.cos(2 * tb) + 0.05 * state.hidden * x * x
        return Output(-(v + 0.3 * torch.sin(3 * tb + x)))

    def modulation_bytes(self, state) -> int:
        return 2**62

    def denoiser(self, guided):
        def denoise(x, t, at):
            self.now = float(t)
            return guided(x, t, at)

        return denoise


def _solver(kwargs):
    kind = kwargs["kind"]
    rule, last_rule = (
        kwargs.get(name, "ode_step_fn").removesuffix("_step_fn").replace("sde_", "")
        for name in ("step_fn", "last_step_fn")
    )
    if kind == "heun":
        return Heun(reuse=not kwargs.get("exact_henu", False), rule=rule, last_rule=last_rule)
    if kind == "adamlm":
        nodes = NODES.get(kwargs.get("lms_transform", ""), "time")
        return AdamsBashforth(kwargs.get("order", 2), nodes, precision="float32")
    return Euler(rule, last_rule=last_rule)


def _refresh(kwargs):
    if "recompute" in kwargs:
        return kwargs["recompute"]
    rate = kwargs.get("state_refresh_rate", 1)
    return None if rate == 1 else range(0, kwargs["num_steps"], rate)


def _run(case, kwargs):
    """The final sample, the network, the refreshes and the evaluated (branch, t) counts."""
    net, x = ClosedForm(), case.inputs["noise"]
    bounds = kwargs.get("guidance_interval_min", 0.0), kwargs.get("guidance_interval_max", 1.0)
    has_interval = kwargs.get("stateful", kwargs["kind"] != "heun") or kwargs["kind"] == "adamlm"
    interval = Interval(1 - bounds[1], 1 - bounds[0]) if has_interval else None
    guided = Guided(
        {n: Branch(net, Condition(labels=case.inputs[k])) for n, k in (("cond", "cond"), ("null", "uncond"))},
        classifier_free(kwargs["guidance"], interval),
        path=LinearPath(),
    )
    noises = iter(case.inputs["step_noise"])
    grid = TimeGrid(kwargs["num_steps"], kwargs.get("timeshift", 1.0), kwargs.get("last_step")).times()
    out = integrate(
        _solver(kwargs),
        net.denoiser(guided),
        x,
        grid,
        path=LinearPath(),
        noise=lambda at: next(noises),
        refresh=_refresh(kwargs),
    )
    return out, net, grid, interval


@pytest.mark.parametrize("case", cases("ddt", klass="EulerSampler, HeunSampler"), ids=str)
def test_samplers_match_official(case):
    for name, kwargs in case.kwargs.items():
        out, *_ = _run(case, kwargs)
        case.check(name, out)


@pytest.mark.parametrize("case", cases("ddt", klass="EulerSampler, HeunSampler"), ids=str)
def test_refreshes_recompute_nothing_extra(case):
    """Each refresh encodes the null branch exactly when it has a weight before the next refresh."""
    for kwargs in case.kwargs.values():
        steps = _refresh(kwargs)
        if steps is None:
            continue
        _, net, grid, interval = _run(case, kwargs)
        bounds = [*sorted(steps), kwargs["num_steps"]]
        expected = [
            case.inputs["noise"].shape[0] * (2 if any(float(t) in interval for t in grid[a:b]) else 1)
            for a, b in pairwise(bounds)
        ]
        assert net.num_encoded == expected


@pytest.mark.parametrize("case", cases("ddt", klass="timesteps"), ids=str)
def test_grids_and_coefficients_match_official(case):
    for name, kwargs in case.kwargs["timesteps"].items():
        grid = TimeGrid(kwargs["num_steps"], kwargs["timeshift"], kwargs["last_step"]).times()
        assert grid.dtype == torch.float64
        case.check(f"timesteps/{name}", (1 - grid).float())
    t = 1 - case.inputs["t"]
    path = LinearPath()
    c = path.at(t)
    case.check("linear/alpha", c.alpha)
    case.check("linear/sigma", c.sigma)
    case.check("linear/w", c.sigma)
    case.check("linear/dalpha", -c.d_alpha)
    case.check("linear/dsigma", -c.d_sigma)
    case.check("linear/dsigma_mul_sigma", -c.d_sigma * c.sigma)
    drift = path.drift(t) * c.alpha.clamp(min=1e-6) / (c.alpha + 1e-6)  # the official code divides by alpha + 1e-6
    case.check("linear/drift_coefficient", -drift, relative=True)
    diffusion = path.diffusion(t) + (path.drift(t) - drift) * c.sigma**2
    case.check("linear/diffuse_coefficient", -diffusion, relative=True)


@pytest.mark.parametrize("case", cases("ddt", klass="lagrange_preint"), ids=str)
def test_multistep_weights_match_official(case):
    for grid_name in case.kwargs["grids"]:
        t = case.inputs[f"t/{grid_name}"]
        orders = sorted({int(k.split("/o")[1][0]) for k in case.outputs if k.startswith(f"{grid_name}/o")})
        for order in orders:
            rows, integrals = [], []
            for n in range(1, len(t)):
                first = max(0, n - order)
                weights = adams_weights(t[first:n], t[n - 1], t[n])
                rows.append([0.0] * (4 - len(weights)) + list(weights))
                values = [1 + 0.5 * j**2 for j in range(first, n)]
                integrals.append(float(t[n] - t[n - 1]) * math.fsum(w * v for w, v in zip(weights, values)))
            case.check(f"{grid_name}/o{order}/coeffs", torch.tensor(rows, dtype=torch.float64))
            case.check(f"{grid_name}/o{order}/integral", torch.tensor(integrals, dtype=torch.float64))


class Recorded:
    """The draws of an official training step, in untwine's direction of time."""

    def __init__(self, inputs):
        self.given = {"t": -inputs["base_draw"], "noise": inputs["noise"]}

    def normal(self, name, shape, index, *, device=None):
        return self.given[name]

    def uniform(self, name, shape, index, *, device=None):
        return 1 + self.given[name]


@pytest.mark.parametrize("case", [*cases("ddt", klass="REPATrainer"), *cases("ddt", klass="DisperseTrainer")])
def test_flow_matching_loss_matches_official(case):
    """The flow part of the official training steps: draw, path, target, network and mean."""
    net = case.kwargs["net"]
    model = (DDT if "num_encoder_blocks" in net else ImprovedDiT).from_official(
        {k.removeprefix("net."): v for k, v in case.state.items() if not k.startswith("proj.")}, net
    )
    time = LogitNormalTime(shift=case.kwargs.get("timeshift", 1.0)) if case.kwargs["lognorm_t"] else UniformTime()
    objective = FlowMatching(time=time, label_dropout=0.0)
    batch = Batch(case.inputs["x"], Condition(labels=case.inputs["y"]), torch.arange(len(case.inputs["y"])))
    loss = objective({"model": model}, batch, update="model", step=0, draws=Recorded(case.inputs))
    case.check("fm_loss", loss.parts["flow"])
