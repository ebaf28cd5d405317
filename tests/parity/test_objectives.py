"""Losses of the family against the official codes' numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.cases import Case, cases
from tests.parity.closed_form import (
    DiTStub,
    FamilyStub,
    PackedStub,
    Recorded,
    batch_of,
    path_of,
    time_of,
)
from untwine.contracts import Condition, Loss
from untwine.diffusion.paths import CosinePath, DiscretePath, LinearPath
from untwine.diffusion.timesteps import (
    ArctanNormalTime,
    LogitNormalTime,
    UniformTime,
)
from untwine.models.ddt import DDT
from untwine.training.objectives.alignment import Alignment
from untwine.training.objectives.flow_matching import FlowMatching
from untwine.training.objectives.joint import BasePrediction, ClassToken
from untwine.training.objectives.learned_variance import VariationalBound
from untwine.training.objectives.mean_flow import MeanFlow as MeanFlowObjective


@pytest.mark.parametrize("case", cases("dit", klass="SpacedDiffusion"), ids=str)
def test_loss_of_dit(case):
    """q_sample, the mean squared error, the variational bound in bits, and their sum."""
    path = DiscretePath()
    objective = FlowMatching(path=path, time=UniformTime(), label_dropout=0.0, terms=(VariationalBound(),))
    x = case.inputs["x_start"]
    level = case.inputs["t"]
    draws = Recorded(t=(level + 0.5) / 1000, noise=case.inputs["noise"])
    batch = batch_of(x, torch.zeros_like(level))
    case.check("q_sample", objective.draw(DiTStub(), batch, draws).x_t)
    terms = {"mse": 0, "vb": 1}
    found = {}
    draw = objective.draw(DiTStub(), batch, draws)
    output = DiTStub()(draw.x_t, draw.t, batch.condition)
    for name, k in terms.items():
        (found[name],) = objective.terms[k](draw, output, {"model": DiTStub()}).values()
        case.check(f"train/{name}", found[name])
    loss = objective({"model": DiTStub()}, batch, update="model", step=0, draws=draws)
    case.check("train/loss", found["mse"] + found["vb"])
    torch.testing.assert_close(loss.total, case.outputs["train/loss"].mean(), rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("case", cases("repa", klass="SILoss"), ids=str)
def test_loss_of_repa(case):
    encoders = [name.removeprefix("zs_") for name in case.inputs if name.startswith("zs_") and "tilde" not in name]
    for name, setting in case.meta["settings"].items():
        is_cosine, is_uniform = setting["path_type"] == "cosine", setting["weighting"] == "uniform"
        time = UniformTime() if is_uniform else ArctanNormalTime() if is_cosine else LogitNormalTime()
        given = {k: case.inputs[f"zs_tilde_{k}"].clone().requires_grad_() for k in encoders}
        stub = FamilyStub(given=torch.cat(list(given.values()), -1))
        widths = {k: case.inputs[f"zs_{k}"].shape[-1] for k in encoders}
        term = Alignment(width=stub.given.shape[-1], targets=widths, scale=setting["proj_coeff"])
        term.projectors = nn.ModuleList(_slices(list(widths.values())))
        objective = FlowMatching(
            path=CosinePath() if is_cosine else LinearPath(), time=time, label_dropout=0.0, terms=(term,)
        )
        draws = Recorded(
            t=case.inputs[f"{name}/draw0_{'rand' if is_uniform else 'randn'}"].flatten(),
            noise=case.inputs[f"{name}/draw1_randn_like"],
        )
        features = {k: case.inputs[f"zs_{k}"] for k in encoders}
        batch = batch_of(case.inputs["x"], case.inputs["y"], features=features)
        loss = objective({"model": stub}, batch, update="model", step=0, draws=draws)
        loss.total.backward()
        case.check(f"{name}/denoising_per_sample", loss.per_sample)
        case.check(f"{name}/proj", loss.parts["alignment"])
        case.check(f"{name}/total", loss.total)
        case.check(f"{name}/grad_w", stub.w.grad)
        for k in encoders:
            found, expected = given[k].grad, case.outputs[f"{name}/grad_zs_tilde_{k}"]
            torch.testing.assert_close(found, expected, rtol=0, atol=float(case.meta["tolerance_grad_zs_tilde"]))


class _Slice(nn.Module):
    """Stands for a projector: the case gives the projected tokens."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.place = slice(first, last)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.place]


def _slices(widths: list[int]) -> list[_Slice]:
    ends = [sum(widths[: k + 1]) for k in range(len(widths))]
    return [_Slice(end - width, end) for end, width in zip(ends, widths)]


def official_draws(case: Case, name: str, setting: dict[str, Any]) -> dict[str, Tensor]:
    """The recorded draws by our names; the kinds tell which is which."""
    found = [case.inputs[f"{name}/draw{k}_{kind.split('[')[0]}"] for k, kind in enumerate(setting["draws"])]
    if "mf" not in setting:
        drop, noise, t, *token = found
        if token:
            noise = torch.cat((noise.flatten(1), token[0]), 1)[:, None]
        return {"label_dropout": drop, "noise": noise, "t": t}
    noise, t, *end, drop = found
    return {"label_dropout": drop, "noise": noise, "t": t, **({"r": end[0]} if end else {})}


def objective_of(case: Case, setting: dict[str, Any]) -> FlowMatching:
    transport = setting["transport"]
    shared: dict[str, Any] = {
        "path": path_of(transport),
        "time": time_of(transport),
        "label_dropout": setting["drop"],
    }
    if "mf" in setting:
        interval = transport.get("cfg_t_start", 0.0), transport.get("cfg_t_end", 1.0)
        return MeanFlowObjective(
            **shared, omega=transport["cfg_omega"], kappa=transport["cfg_kappa"], guidance_interval=interval
        )
    terms: list[Any] = []
    if setting.get("repa"):
        width = case.inputs["z_clean"].shape[-1]
        terms.append(Alignment(width=width, targets={"z": width}, metric="mse"))
        terms[-1].projectors = nn.ModuleList([nn.Identity()])
    if setting.get("reg"):
        terms.append(ClassToken())
    if setting.get("kind") == "ig":
        terms.append(BasePrediction(scale=setting["bmc"]))
    return FlowMatching(**shared, loss_in="velocity", terms=tuple(terms))


def stub_of(case: Case, setting: dict[str, Any]) -> FamilyStub:
    features = case.inputs["z_proj"] if setting.get("repa") else None
    if setting.get("reg"):
        stub = PackedStub(tuple(case.inputs["x1"].shape[1:]), case.inputs["cls_clean"].shape[1], features=features)
    else:
        stub = FamilyStub(features=features)
    stub.predicts = "x0" if setting["transport"]["prediction"] == "x" else "velocity"
    stub.has_base = setting.get("kind") == "ig"
    if "mf" in setting:
        stub.accepts = frozenset({"labels", "vectors.r"})
    return stub


@pytest.mark.parametrize("case", cases("ddt-head", klass="Transport"), ids=str)
def test_losses_of_diffusion_bench(case):
    for name, setting in case.meta["settings"].items():
        objective, stub = objective_of(case, setting), stub_of(case, setting)
        draws = Recorded(1.0 if setting.get("mf") == "mf" else 0.0, **official_draws(case, name, setting))
        x0 = case.inputs["x1"]
        if setting.get("reg"):
            x0 = stub.pack(x0, case.inputs["cls_clean"])
        features = {"z": case.inputs["z_clean"]} if setting.get("repa") else {}
        null = Condition(labels=case.inputs["context_null"])
        batch = batch_of(x0, case.inputs["context"], features=features, null=null)
        loss = objective({"model": stub}, batch, update="model", step=0, draws=draws)
        loss.total.backward()
        case.check(f"{name}/total", loss.total)
        case.check(f"{name}/grad_w", stub.w.grad)
        if "mf" in setting:
            case.check(f"{name}/orig_mf_loss", loss.per_sample * x0[0].numel(), relative=True)
        else:
            check_parts(case, name, objective, loss)


def check_parts(case: Case, name: str, objective: FlowMatching, loss: Loss) -> None:
    """The official element-wise loss holds that of the base prediction; its other parts are scaled."""
    scales = {}
    for term, part in ((Alignment, "alignment"), (ClassToken, "class_token"), (BasePrediction, "base")):
        scales[part] = next((t.scale for t in objective.terms if isinstance(t, term)), 0.0)
    scaled = {part: scale * loss.parts.get(part, torch.zeros(())) for part, scale in scales.items()}
    case.check(f"{name}/loss_repa", scaled["alignment"])
    case.check(f"{name}/loss_reg", scaled["class_token"])
    found = {"loss": loss.parts["flow"] + scaled["base"]}
    if f"{name}/loss_base" in case.outputs:
        found["loss_base"] = loss.parts["base"]
    for key, value in found.items():
        torch.testing.assert_close(value, case.outputs[f"{name}/{key}"].mean(), rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("case", cases("ddt", klass="REPATrainer"), ids=str)
def test_alignment_of_ddt(case):
    """DDT's loss is the same plus one, at its own projector's widths; targets on another grid are resized."""
    model = DDT.from_official(
        {k.removeprefix("net."): v for k, v in case.state.items() if not k.startswith("proj.")}, case.kwargs["net"]
    )
    weights = {k.split(".", 2)[2]: v for k, v in case.state.items() if k.startswith("proj.")}
    width, hidden = weights["0.weight"].shape[::-1]
    term = Alignment(
        width=width,
        targets={"dino": len(weights["4.weight"])},
        site=f"blocks.{case.kwargs['align_layer'] - 1}",
        projector_width=hidden,
        scale=case.kwargs["feat_loss_weight"],
    )
    term.projectors[0].load_state_dict(weights)
    time = LogitNormalTime() if case.kwargs["lognorm_t"] else UniformTime()
    objective = FlowMatching(time=time, label_dropout=0.0, terms=(term,))
    draw = case.inputs["base_draw"]
    draws = Recorded(t=-draw if case.kwargs["lognorm_t"] else 1 - draw, noise=case.inputs["noise"])
    batch = batch_of(case.inputs["x"], case.inputs["y"], features={"dino": case.inputs["encoder_features"]})
    loss = objective({"model": model}, batch, update="model", step=0, draws=draws)
    case.check("cos_loss", loss.parts["alignment"] + 1)
    case.check("loss", loss.total + term.scale)
