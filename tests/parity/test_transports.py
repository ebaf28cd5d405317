"""Paths, times, samplers, guidance and schedules of the family against the official codes' numbers."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import untwine
from tests.parity.cases import Case, cases
from tests.parity.closed_form import (
    AT,
    DiTStub,
    FamilyStub,
    PackedStub,
    Recorded,
    alone,
    expand,
    path_of,
)
from untwine.contracts import Batch, Condition, Output
from untwine.diffusion.guidance import Branch, Guided, classifier_free
from untwine.diffusion.paths import CosinePath, DiscretePath, LinearPath, VPPath
from untwine.diffusion.sampling import Sampling, guided_by, integrate
from untwine.diffusion.solvers import DDIM, DIFFUSIONS, AncestralDDPM, Euler, Heun, MeanFlow, Midpoint, StochasticHeun
from untwine.diffusion.timesteps import (
    LogitNormalTime,
    TimeGrid,
    UniformTime,
    dimension_shift,
    discrete_grid,
    shift_time,
)
from untwine.models.layers.packing import Packing
from untwine.training.objectives.flow_matching import FlowMatching
from untwine.training.optim import CosineSchedule, LinearSchedule


@pytest.mark.parametrize("case", cases("dit", klass="SpacedDiffusion"), ids=str)
def test_schedule_and_samplers_of_dit(case):
    path = DiscretePath()
    levels = (torch.arange(1000) + 1).double() / 1000
    before = levels - 1 / 1000
    case.check("betas", path.transition(levels, before)[1])
    case.check("alphas_cumprod", path.at(levels).alpha ** 2)
    variance = path.posterior(levels, levels, levels, before)[1]
    variance[0] = variance[1]
    case.check("posterior_log_variance_clipped", variance.log())
    for respacing in case.kwargs["respacings"]:
        spacing = "stride" if respacing.startswith("ddim") else "even"
        grid = discrete_grid(1000, int(respacing.removeprefix("ddim")), spacing)
        case.check(f"{respacing}/timesteps", path.levels(grid).flip(0)[1:])
        case.check(f"{respacing}/betas", path.transition(grid[:-1], grid[1:])[1].flip(0))
        noise = case.inputs["step_noise"]
        for name, solver in {"ddpm": AncestralDDPM("learned"), "ddim": DDIM()}.items():
            guided = Guided({"cond": Branch(DiTStub(), Condition())}, alone, path=path)
            out = integrate(
                solver, guided, case.inputs["x_T"], grid, path=path, noise=lambda at, noise=noise: noise[at.step]
            )
            case.check(f"{respacing}/{name}", out)


@pytest.mark.parametrize("case", cases("dit", klass="DiT", file="models.py"), ids=str)
@torch.no_grad()
def test_guidance_of_three_channels(case):
    """DiT's ``forward_with_cfg``: the other channels, and the variance, are those of the condition."""
    model = untwine.from_official("dit", case.state, case.kwargs)
    x, level, labels = (case.inputs[name] for name in "xty")
    sampling = Sampling(guidance_scale=4.0, guidance_channels=3)
    for b in range(len(x)):
        row = slice(b, b + 1)
        condition = Condition(labels=labels[row].clamp(max=model.config.num_classes - 1))
        guided = guided_by(sampling, model, condition, sampling.grid(LinearPath()), LinearPath())
        found = guided(x[row], (level[b] + 1).double() / 1000, AT)
        expected = case.outputs["cfg4"][: len(x)][row]
        value = torch.cat((found.value, found.variance), 1)
        torch.testing.assert_close(value, expected, rtol=0, atol=case.tolerance)


# SiT

PATHS = {"Linear": LinearPath(), "GVP": CosinePath(), "VP": VPPath()}
FORMS = {
    "sigma": "sigma", "SBDM": "forward", "linear": "time", "constant": "one", "decreasing": "decreasing",
    "inccreasing-decreasing": "middle", "increasing-decreasing": "middle",
}  # fmt: skip
LAST = {"Mean": "mean", "Tweedie": "tweedie", "Euler": "ode", None: "sde"}


@dataclass
class SiTStub:
    """The closed-form networks of the case in their time, 1 - t; velocities have the other sign."""

    predicts: str
    accepts = frozenset()
    decoupled = False

    def __call__(self, x, t, condition, features=()):
        t = expand(1 - t)
        spread = t**2 + (1 - t) ** 2
        values = {
            "velocity": lambda: -(0.6 * torch.tanh(x) * torch.cos(2 * t) - 0.2 * x + 0.1 * t),
            "noise": lambda: x * (1 - t) / spread + 0.2 * t * torch.sin(x),
            "score": lambda: -x / spread + 0.2 * t * torch.sin(x),
        }
        return Output(values[self.predicts]())


def transports(case: Case) -> list[Any]:
    """(name, path, what is predicted, weighting, forms, methods, last steps) of each setting."""
    rows = []
    for path, kind, weight, *lists in case.kwargs:
        rows.append((f"{path}_{kind}_{weight}", path, kind, weight, *(ast.literal_eval(entry) for entry in lists)))
    return rows


@pytest.mark.parametrize("case", cases("sit", klass="Transport"), ids=str)
def test_transport_of_sit(case):
    """Path, target, drifts, score and the loss."""
    x0, noise, u = case.inputs["x1"], case.inputs["x0"], case.inputs["u"]
    for name, path_name, kind, weight, *_ in transports(case):
        path, stub, t = PATHS[path_name], SiTStub(kind), 1 - u
        low, high = case.outputs[f"{name}/interval_train"].tolist()
        x = path.interpolate(x0, noise, t)
        case.check(f"{name}/xt", x)
        case.check(f"{name}/ut", -path.velocity(x0, noise, t))
        case.check(f"{name}/drift_mean", expand(path.drift(t)) * x0)  # the case calls it at its clean sample
        case.check(f"{name}/drift_var", expand(path.diffusion(t)))
        guided = Guided({"cond": Branch(stub, Condition())}, alone, path=path)
        predictions = [guided(x0[b : b + 1], t[b], AT) for b in range(len(x0))]
        case.check(f"{name}/score_fn", torch.cat([p.score for p in predictions]))
        case.check(f"{name}/ode_drift", torch.cat([-p.velocity for p in predictions]))
        objective = FlowMatching(
            path=path,
            time=UniformTime(1 - high, 1 - low),
            loss_in="noise" if kind == "score" else None,
            weighting="constant" if weight == "None" else weight,
            label_dropout=0.0,
        )
        draws = Recorded(t=1 - u, noise=noise)
        batch = Batch(x0, Condition(), torch.arange(len(x0)))
        weights = objective.draw(stub, batch, draws).weight
        loss = objective({"model": stub}, batch, update="model", step=0, draws=draws)
        per_sample = loss.per_sample if weights is None else loss.per_sample * weights
        case.check(f"{name}/train_loss", per_sample)


def grid_of(path: str, kind: str, num_points: int, last: str | None, *, form: str | None = None) -> Tensor:
    """The official points: a margin of 0.001 at singular ends, and before a special last step one of 0.04."""
    is_singular = kind != "velocity"
    start = 1 - 1e-3 * (path != "VP" and is_singular)
    margin = 1e-3 * (path == "VP" or is_singular)
    if form is None or last is None:
        return TimeGrid(num_points - 1, start=start, end=margin).times()
    return TimeGrid(num_points, last_step=0.04, start=start).times()


@pytest.mark.parametrize("case", cases("sit", klass="Transport"), ids=str)
def test_samplers_of_sit(case):
    """Every sampler of the case: no outcome is left out."""
    noise, left = case.inputs["step_noise"], {key for key in case.outputs if "/sde_" in key or "/ode_euler" in key}
    for name, path_name, kind, _, forms, methods, lasts in transports(case):
        path, stub = PATHS[path_name], SiTStub(kind)
        guided = Guided({"cond": Branch(stub, Condition())}, alone, path=path)

        def check(key, solver, grid, path=path, guided=guided, name=name):
            out = integrate(solver, guided, case.inputs["noise"], grid, path=path, noise=lambda at: noise[at.step])
            case.check(f"{name}/{key}", out)
            left.remove(f"{name}/{key}")

        num_points = case.meta["num_steps"]
        check("ode_euler", Euler(), grid_of(path_name, kind, num_points, None))
        for form, method, last in product(forms, methods, lasts):
            key = f"sde_{method}_{form}_{last}"
            if f"{name}/{key}" in left:
                solver = Euler if method == "Euler" else StochasticHeun
                grid = grid_of(path_name, kind, num_points, last, form=form)
                check(key, solver(rule="sde", weight=FORMS[form], last_rule=LAST[last]), grid)
        for form in forms:
            if f"{name}/diffusion_{form}" in case.outputs:
                weight = DIFFUSIONS[FORMS[form]](path, 1 - case.inputs["u"])
                case.check(f"{name}/diffusion_{form}", expand(weight))
    assert not left


# RAE


class RAEStub:
    predicts, accepts, decoupled = "velocity", frozenset(), False

    def __call__(self, x, t, condition, features=()):
        t = expand(t)
        return Output(0.5 * torch.tanh(x) * torch.cos(3 * t) - 0.3 * x + 0.1 * t)


def rae_time(name: str, shift: float) -> UniformTime | LogitNormalTime:
    """The training times of a name such as logit-normal_0_1."""
    if name == "uniform":
        return UniformTime(high=0.999, shift=shift)
    mean, std = (float(word) for word in name.split("_")[1:])
    return LogitNormalTime(mean, std, shift, high=0.999)


@pytest.mark.parametrize("case", cases("rae", klass="Transport"), ids=str)
def test_transport_of_rae(case):
    x0, noise = case.inputs["x1"], case.inputs["x0"]
    batch = Batch(x0, Condition(), torch.arange(len(x0)))
    for dim, base in case.kwargs["dim_base"]:
        shift = dimension_shift((dim,), base=base)
        case.check(f"shift/{dim}_{base}", torch.tensor(shift).double())
        for name in case.kwargs["time_dist"]:
            objective = FlowMatching(time=rae_time(name, shift), label_dropout=0.0)
            draw = objective.draw(RAEStub(), batch, Recorded(t=case.inputs["u"][: len(x0)], noise=noise))
            case.check(f"train_t/{dim}_{name}", draw.t)
            case.check(f"xt/{dim}_{name}", draw.x_t)
            case.check(f"ut/{dim}_{name}", draw.target)
        for num_points in case.kwargs["num_steps"]:
            grid = Sampling(num_inference_steps=num_points - 1, shift=shift, grid_end=0.001).grid(LinearPath())
            case.check(f"grid/{dim}_{num_points}", grid)
            for name, solver in {"euler": Euler(), "midpoint": Midpoint()}.items():
                guided = Guided({"cond": Branch(RAEStub(), Condition())}, alone, path=LinearPath())
                out = integrate(solver, guided, case.inputs["noise"], grid, path=LinearPath())
                case.check(f"{name}/{dim}_{num_points}", out)


@pytest.mark.parametrize("case", cases("repa", klass="euler_sampler"), ids=str)
def test_samplers_of_repa(case):
    """Both stages of a Heun step are guided by the time at which the step starts, on the official float64 grid."""
    condition = Condition(labels=case.inputs["y"])
    null = Condition(labels=torch.full_like(case.inputs["y"], 1000))
    for name, setting in case.meta["settings"].items():
        is_sde = setting["function"] == "euler_maruyama_sampler"
        low, high = setting.get("guidance_low", 0.0), setting.get("guidance_high", 1.0)
        num_steps, end = setting["num_steps"], 0.04 if is_sde else 0.0
        official = torch.linspace(1, end, num_steps + (not is_sde), dtype=torch.float64)
        grid = TimeGrid(num_steps, last_step=0.04 if is_sde else None).times()
        table = classifier_free(setting["cfg_scale"])
        stub = FamilyStub()

        def weights(at, t, official=official, low=low, high=high, table=table):
            return table(at, t) if low <= float(official[at.step]) <= high else alone(at, t)

        guided = Guided({"cond": Branch(stub, condition), "null": Branch(stub, null)}, weights, path=LinearPath())

        def denoise(x, t, at, guided=guided):
            return replace(guided(x.float(), t, at), x=x)

        solver = Heun() if setting.get("heun") else Euler("sde", "time", "mean") if is_sde else Euler()
        with torch.no_grad():
            out = integrate(
                solver,
                denoise,
                case.inputs["latents"].double(),
                grid,
                path=LinearPath(),
                noise=lambda at, name=name: case.inputs[f"{name}/noises"][at.step],
            )
        case.check(name, out)


class GuidedStub(FamilyStub):
    """The network of the case on one sample; where the null branch has an x of its own, it is given on the side."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self.has_base, self.own = True, own

    def forward(self, x, t, condition, features=()):
        x = torch.where((condition.labels == 9).view(-1, 1, 1, 1), self.own, x)
        return super().forward(x, t, condition, features)


class PackedGuidedStub(PackedStub):
    def __init__(self, own: Tensor, image: tuple[int, ...], token: int) -> None:
        super().__init__(image, token)
        self.has_base, self.own = True, own

    def forward(self, x, t, condition, features=()):
        x = torch.where((condition.labels == 9).view(-1, 1, 1), self.own, x)
        return super().forward(x, t, condition, features)


def guidance_settings(words: dict[str, Any]) -> dict[str, Sampling]:
    cfg = {"guidance_scale": words["cfg_scale"], "guidance_interval": tuple(words["cfg_interval"])}
    internal = {"internal_scale": words["ig_scale"], "internal_interval": tuple(words["ig_interval"])}
    shared = {"closed_interval": True, "num_inference_steps": 1}
    return {
        "cfg": Sampling(**shared, **cfg),
        "internal": Sampling(**shared, **internal),
        "internal_cfg": Sampling(**shared, **cfg, **internal),
        "internal_cfg_uncond_scale": Sampling(
            **shared, **cfg, **internal, internal_null_scale=words["uncond_ig_scale"]
        ),
    }


@pytest.mark.parametrize("case", cases("ddt-head", klass="forward_with_cfg"), ids=str)
def test_guidance_of_diffusion_bench(case):
    """Each sample has its own time, so they go one by one. The second half of the batch is the null branch, which has
    a class token of its own, and with ``internal_cfg`` an image of its own."""
    for name, sampling in guidance_settings(case.meta["settings"]).items():
        half = range(len(case.inputs["x"]) // 2)
        case.check(name, torch.cat([guided_row(case, name, sampling, b, packed=False) for b in half] * 2))
        rows = torch.cat([guided_row(case, name, sampling, b, packed=True) for b in half] * 2)
        parts = packing_of(case).unpack(rows)
        case.check(f"{name}_reg", parts["image"])
        case.check(f"{name}_reg_cls", parts["token"])


def packing_of(case: Case) -> Packing:
    return Packing({"image": tuple(case.inputs["x"].shape[1:]), "token": (case.inputs["cls_t"].shape[1],)})


@torch.no_grad()
def guided_row(case: Case, name: str, sampling: Sampling, b: int, *, packed: bool) -> Tensor:
    """The guided output for one sample."""
    x, t, labels, token = (case.inputs[key] for key in ("x", "t", "context", "cls_t"))
    cond, null = slice(b, b + 1), slice(b + len(x) // 2, b + len(x) // 2 + 1)
    seen = x[null] if name.startswith("internal_cfg") else x[cond]
    if packed:
        packing = packing_of(case)
        own = packing.pack({"image": seen, "token": token[null]})
        start = packing.pack({"image": x[cond], "token": token[cond]})
        stub: Any = PackedGuidedStub(own, packing.shapes["image"], *packing.shapes["token"])
    else:
        start, stub = x[cond], GuidedStub(seen)
    grid = torch.tensor([1.0, 0.0])
    return guided_by(sampling, stub, Condition(labels=labels[cond]), grid, LinearPath())(start, t[b].double(), AT).value


@pytest.mark.parametrize("case", cases("ddt-head", klass="Sampler"), ids=str)
def test_samplers_of_diffusion_bench(case):
    x, labels = case.inputs["x"], case.inputs["context"]
    for name, setting in case.meta["settings"].items():
        transport = setting["transport"]
        scale, interval = setting["cfg"] or (1.0, (0.0, 1.0))
        sampling = Sampling(
            solver=MeanFlow() if setting["meanflow"] else Euler(),
            num_inference_steps=setting["num_steps"],
            guidance_scale=scale,
            guidance_interval=tuple(interval),
            closed_interval=True,
            shift=transport.get("time_dist_shift_eval", 1.0),
        )
        stub, start = FamilyStub(), x
        if setting["reg"]:
            stub = PackedStub(tuple(x.shape[1:]), case.inputs["cls_t"].shape[1])
            start = stub.pack(x, case.inputs["cls_t"])
        stub.predicts = "x0" if transport["prediction"] == "x" else "velocity"
        if setting["meanflow"]:
            stub.accepts = frozenset({"labels", "vectors.r"})
        path = path_of(transport)
        grid = sampling.grid(path)
        case.check(f"{name}/t_grid", grid)
        guided = guided_by(sampling, stub, Condition(labels=labels), grid, path)
        with torch.no_grad():
            out = integrate(sampling.solver, guided, start, grid, path=path)
        case.check(f"{name}/x0", stub.unpack(out)["image"] if setting["reg"] else out)


@pytest.mark.parametrize("case", cases("ddt-head", klass="time shift"), ids=str)
def test_schedules_of_diffusion_bench(case):
    """Shifts by dimension, shifted times, and the learning rate by step; the coin of MeanFlow is a stream of ours."""
    shifts = [dimension_shift((dim,)) for dim in case.inputs["dims"].tolist()]
    case.check("shift", torch.tensor(shifts))
    case.check("shifted", torch.stack([shift_time(case.inputs["u"], shift) for shift in shifts]))
    schedules = {
        "lr_linear": LinearSchedule(hold_steps=200, end_step=800, final=0.1),
        "lr_linear_w0": LinearSchedule(warmup_steps=200, end_step=800, final=0.1),
        "lr_cosine": CosineSchedule(warmup_steps=50, end_step=700, final=0.1),
    }
    for name, schedule in schedules.items():
        rates = [2e-4 * schedule.multiplier(step, 10**6) for step in case.inputs["lr_steps"].tolist()]
        torch.testing.assert_close(torch.tensor(rates).double(), case.outputs[name], rtol=1e-6, atol=1e-12)
