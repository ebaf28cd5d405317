"""DiT, SiT, LightningDiT and the DDT heads against the official codes' numbers; DiT to diffusers and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import untwine
from tests.parity.cases import Case, cases
from untwine.contracts import Condition, Tokens
from untwine.diffusion.guidance import Branch, Guided, Interval, classifier_free
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import StepInfo
from untwine.models.ddt_head import DDTHead
from untwine.models.dit import DiT
from untwine.models.lightningdit import LightningDiT
from untwine.models.sit import SiT

AT = StepInfo(0, 0, 1)


def guided(cond: Tensor, null: Tensor, scale: float, channels: int = 3) -> Tensor:
    """DiT's and SiT's guidance, which leaves all but the first three channels alone."""
    mixed = null + scale * (cond - null)
    return torch.cat((mixed[:, :channels], cond[:, channels:]), 1)


def both_branches(model, x, t, y) -> tuple[Tensor, Tensor]:
    """Everything the network puts out, under the labels that the cases guide towards and under the null."""
    condition = Condition(labels=y.clamp(max=model.config.num_classes - 1))
    outs = [model(x, t, c) for c in (condition, model.null(condition))]
    cond, null = (torch.cat((out.sample, *out.extra.values()), 1) for out in outs)
    return cond, null


@pytest.mark.parametrize("case", cases("dit", klass="DiT", file="models.py"), ids=str)
def test_dit(case):
    model = untwine.from_official("dit", case.state, case.kwargs)
    assert isinstance(model, DiT)
    x, t, y = (case.inputs[name] for name in "xty")
    ours = (t + 1) / 1000
    out = model(x, ours, Condition(labels=y))
    case.check("out", torch.cat((out.sample, *out.extra.values()), 1))
    cond, null = both_branches(model, x, ours, y)
    mixed = guided(cond, null, 4.0)
    unconditional = torch.cat((mixed[:, :3], null[:, 3:]), 1)
    case.check("cfg4", torch.cat((mixed, unconditional)))


@pytest.mark.parametrize("case", cases("sit", klass="SiT", file="models.py"), ids=str)
def test_sit(case):
    model = untwine.from_official("sit", case.state, case.kwargs)
    assert isinstance(model, SiT)
    x, t, y = (case.inputs[name] for name in "xty")
    case.check("out", -model(x, 1 - t, Condition(labels=y)).sample)
    cond, null = both_branches(model, x, 1 - t, y)
    mixed = guided(cond, null, 1.5)
    case.check("cfg", -torch.cat((mixed, torch.cat((mixed[:, :3], null[:, 3:]), 1))))


@pytest.mark.parametrize("case", cases("repa", klass="SiT", file="sit.py"), ids=str)
def test_sit_of_repa(case):
    """Its time already runs our way; the projectors read the features of block ``encoder_depth``, counted from 1."""
    model = untwine.from_official("repa", case.state, case.kwargs)
    site = f"blocks.{case.kwargs['encoder_depth'] - 1}"
    out = model(case.inputs["x"], case.inputs["t"], Condition(labels=case.inputs["y"]), features=[site])
    case.check("x", out.sample)
    for k in range(len(case.kwargs["z_dims"])):
        z = out.features[site]
        for i in (0, 2, 4):
            z = F.linear(z, case.state[f"projectors.{k}.{i}.weight"], case.state[f"projectors.{k}.{i}.bias"])
            z = F.silu(z) if i < 4 else z
        case.check(f"zs_{k}", z)


def part(case: Case, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in case.state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("case", cases("rae", klass="DiTwDDTHead"), ids=str)
def test_ddt_head_of_rae(case):
    """Velocity; the head under a given state of the encoder's width; the same with modulations computed once."""
    model = untwine.from_official("rae", part(case, "net."), case.kwargs)
    assert isinstance(model, DDTHead)
    x, t, condition = case.inputs["x"], case.inputs["t"], Condition(labels=case.inputs["y"])
    state = model.encode(x, t, condition)
    case.check("velocity", model.decode(x, state).sample)
    given = replace(state, tokens=model.state[1:](case.inputs["s_given"]))
    case.check("velocity_given_state", model.decode(x, given).sample)
    case.check("velocity_given_state", model.decode(x, model.modulate(given)).sample)


@pytest.mark.parametrize("case", cases("rae", klass="DiTwDDTHead"), ids=str)
def test_guidance_of_rae(case):
    """The case says scale and closed interval in its words; each sample has its own time, so they go one by one."""
    model = untwine.from_official("rae", part(case, "net."), case.kwargs)
    words = case.meta["call"].split("null], ")[1].split("))")[0].replace("(", "").split(", ")
    scale, low, high = (float(word) for word in words)
    weights = classifier_free(scale, Interval(low, high, closed=True))
    weak = part(case, "guide.")
    guide = untwine.from_official("rae", weak, case.kwargs) if weak else None
    null = model.null(Condition(labels=case.inputs["y_cond"]))
    found: dict[str, list[Tensor]] = {"cfg": [], "autoguidance": []}
    for b, t in enumerate(case.inputs["t_guided"]):
        x = case.inputs["x"][b : b + 1]
        condition = Condition(labels=case.inputs["y_cond"][b : b + 1])
        others = {"cfg": Branch(model, null.select(slice(b, b + 1)))}
        others |= {} if guide is None else {"autoguidance": Branch(guide, condition)}
        for name, other in others.items():
            denoise = Guided({"cond": Branch(model, condition), "null": other}, weights, path=LinearPath())
            found[name].append(denoise(x, t, AT).value)
    case.check("cfg", torch.cat(found["cfg"] * 2))
    if guide is not None:
        case.check("autoguidance", torch.cat(found["autoguidance"]))


def in_context(case: Case) -> tuple[Tensor, Tensor, Condition]:
    """x, t and condition of a case of diffusion-bench, whose MeanFlow is given the length of its step."""
    t, vectors = case.inputs["t"], {}
    if "t_abs" in case.inputs:
        end = case.inputs["t_abs"] - t
        t, vectors = case.inputs["t_abs"], {"r": end[:, None, None]}
    context, x = case.inputs["context"], case.inputs["x"]
    if "cls_t" in case.inputs:
        x = torch.cat((x.flatten(1), case.inputs["cls_t"]), 1)[:, None]
    if case.kwargs["condition_type"] == "text":
        mask = case.inputs.get("attn_mask")
        text = Tokens(context, None if mask is None else mask.bool())
        return x, t, Condition(tokens={"text": text}, vectors=vectors)
    return x, t, Condition(labels=context, vectors=vectors)


def check_in_context(case: Case, model) -> None:
    """Prediction, REPA's projected features and the tokens that enter the first block."""
    x, t, condition = in_context(case)
    site = f"blocks.{case.kwargs.get('repa_layer_depth', 1) - 1}"
    seen = {}
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(sequence_in=args[0]))
    out = model(x, t, condition, features=[site])
    handle.remove()
    size = case.inputs["x"].shape[-1]
    num_tokens = (size // model.config.patch_size) ** 2 + ("cls_t" in case.inputs)
    parts = {name: {"image": value} for name, value in (("x", out.sample), *out.extra.items())}
    if "cls_t" in case.inputs:
        parts = {name: model.packing(size).unpack(part["image"]) for name, part in parts.items()}
    results = {"x": parts["x"]["image"], "x_base": parts.get("base", {}).get("image"), **seen}
    results["cls"] = parts["x"].get("token")
    if "t_embed_base" in case.outputs:
        results["t_embed_base"] = model.time_embedder(case.inputs["t"])
    if "zt_intermediate" in case.outputs:
        weight, bias = (case.state[f"repa_projector.{kind}"] for kind in ("weight", "bias"))
        results["zt_intermediate"] = F.linear(out.features[site][:, :num_tokens], weight, bias)
    for name in case.outputs:
        if not name.startswith("jvp_"):
            case.check(name, results[name])


@pytest.mark.parametrize("case", cases("ddt-head", klass="DiTwDDTHead", file="DDT.py"), ids=str)
def test_ddt_head_of_diffusion_bench(case):
    model = untwine.from_official("ddt-head", case.state, case.kwargs)
    assert isinstance(model, DDTHead)
    check_in_context(case, model)


@pytest.mark.parametrize("case", cases("ddt-head", klass="LightningDiT"), ids=str)
def test_lightningdit_of_diffusion_bench(case):
    model = untwine.from_official("ddt-head", case.state, case.kwargs)
    assert isinstance(model, LightningDiT)
    check_in_context(case, model)


def of_two_times(found: list) -> list:
    return [p for p in found if not isinstance(p.values[0], Case) or p.values[0].kwargs.get("is_meanflow")]


@pytest.mark.parametrize("case", of_two_times(cases("ddt-head", klass="DiTwDDTHead", file="DDT.py")), ids=str)
def test_derivative_along_the_mean_flow(case):
    """d u / d t along (velocity, 1, 0) in forward mode, which fused attention does not have."""
    model = untwine.from_official("ddt-head", case.state, case.kwargs)
    x, t, condition = in_context(case)
    r = condition.vectors["r"]

    def predict(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return model(x, t, replace(condition, vectors={"r": r})).sample

    tangents = (case.inputs["jvp_tangent_x"], torch.ones_like(t), torch.zeros_like(r))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        u, du_dt = torch.func.jvp(predict, (x, t, r), tangents)
    case.check("jvp_u", u)
    torch.testing.assert_close(du_dt, case.outputs["jvp_du_dt"], rtol=0, atol=float(case.meta["tolerance_jvp"]))


@pytest.mark.parametrize("case", cases("dit", klass="DiT", file="models.py"), ids=str)
def test_dit_through_diffusers_and_back(case):
    """Every weight returns bitwise, and diffusers' own class computes the same numbers."""
    from untwine.integrations.diffusers_models import from_diffusers, to_diffusers

    model = untwine.from_official("dit", case.state, case.kwargs)
    theirs = to_diffusers(model, sample_size=case.kwargs["input_size"])
    back = from_diffusers(theirs)
    assert {k: v for k, v in back.config.items() if not k.startswith("_")} == {
        k: v for k, v in model.config.items() if not k.startswith("_")
    }
    own = model.state_dict()
    assert own.keys() == back.state_dict().keys()
    for name, value in back.state_dict().items():
        assert torch.equal(value, own[name]), name
    x, t, y = (case.inputs[name] for name in "xty")
    case.check("out", theirs(x, timestep=t, class_labels=y).sample)
