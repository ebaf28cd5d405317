"""Terms and parametrization that make learning faster, against the official codes' numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.parity.cases import Case, cases
from tests.parity.closed_form import Recorded, batch_of
from untwine.contracts import Condition
from untwine.diffusion.timesteps import LogitNormalTime, UniformTime
from untwine.models.dit import DiT, ImprovedDiT
from untwine.models.sit import SiT
from untwine.training.objectives.dispersive import Dispersive
from untwine.training.objectives.flow_matching import FlowMatching
from untwine.training.objectives.sra import SelfAlignment, distance
from untwine.training.optim import AdamW
from untwine.training.parametrization import MuP


@pytest.mark.parametrize("case", cases("ddt", klass="DisperseTrainer"), ids=str)
def test_dispersive_loss_of_ddt(case):
    options = case.kwargs
    model = ImprovedDiT.from_official(case.state, options["net"])
    term = Dispersive(
        site=f"blocks.{options['align_layer'] - 1}",
        temperature=options["temperature"],
        scale=options["feat_loss_weight"],
    )
    # Official times run from noise to data: 1 - s(u) = u' / (u' + (1 - u') / timeshift) with u' = 1 - u.
    draw, shift = case.inputs["base_draw"], 1 / options["timeshift"]
    time = LogitNormalTime(shift=1 / shift) if options["lognorm_t"] else UniformTime()
    t = -draw if options["lognorm_t"] else 1 - draw
    draws = Recorded(t=t, noise=case.inputs["noise"])
    objective = FlowMatching(time=time, label_dropout=0.0, terms=(term,))
    batch = batch_of(case.inputs["x"], case.inputs["y"])
    loss = objective({"model": model}, batch, update="model", step=0, draws=draws)
    case.check("fm_loss", loss.parts["flow"])
    case.check("disperse_loss", loss.parts["dispersive"])
    case.check("loss", loss.total)


NAMES = {"sml1": "smooth_l1", "l1": "l1", "l2": "l2", "cos": "cosine_over_tokens"}


def _network(case: Case, role: str) -> tuple[SiT, dict[str, Tensor]]:
    """A network of the case, and the weights of its projector by our names."""
    state = {k.removeprefix(f"{role}."): v for k, v in case.state.items() if k.startswith(f"{role}.")}
    state.setdefault("pos_embed", case.state["student.pos_embed"])
    head = {k.removeprefix("ap_head.linear"): state.pop(k) for k in list(state) if k.startswith("ap_head.")}
    given = {k: v for k, v in case.kwargs["net"].items() if k not in ("use_alignment_head", "attention_separation")}
    places = {"1": "0", "2": "2"}
    model = SiT.from_official(state, given, system="repa")
    return model, {places[k[0]] + k[1:]: v for k, v in head.items()}


@pytest.mark.parametrize("case", cases("sra", klass="SRALoss", file="SiT-SRA/loss"), ids=str)
def test_loss_of_sra(case):
    options = case.kwargs
    (student, head), (teacher, _) = _network(case, "student"), _network(case, "teacher")
    networks: dict[str, nn.Module] = {"model": student, "teacher": teacher.eval().requires_grad_(False)}
    is_uniform = options["weighting"] == "uniform"
    base = case.inputs["base_draw"].flatten()
    draws = Recorded(t=base, noise=case.inputs["noise"], sra=case.inputs["interval_draw"].flatten())
    sites = f"blocks.{options['block_out_s'] - 1}", f"blocks.{options['block_out_t'] - 1}"
    for official, kind in NAMES.items():
        if f"align/{official}" not in case.outputs:
            continue
        term = SelfAlignment(site=sites[0], teacher_site=sites[1], gap=options["t_max"], distance=kind)
        term.bind(student)
        term.projector.load_state_dict(head)
        time = UniformTime() if is_uniform else LogitNormalTime()
        objective = FlowMatching(time=time, label_dropout=0.0, terms=(term,))
        assert objective.networks()["teacher"].source == "ema:0"
        batch = batch_of(case.inputs["images"], case.inputs["labels"])
        loss = objective(networks, batch, update="model", step=0, draws=draws)
        case.check("denoising_per_sample", loss.per_sample)
        torch.testing.assert_close(
            loss.parts["sra"], case.outputs[f"align/{official}"].mean(), rtol=0, atol=case.tolerance
        )
        draw = objective.draw(student, batch, draws)
        tokens = student(draw.x_t, draw.t, draw.condition, features=sites).features[sites[0]]
        found = distance(term.projector(tokens), term._taught(draw, teacher), kind)
        expected = case.outputs[f"align/{official}"]
        torch.testing.assert_close(found.mean() if expected.ndim == 0 else found, expected, rtol=0, atol=case.tolerance)
    t = torch.sigmoid(base)
    output = student(case.inputs["images"], t, draw.condition, features=sites)
    case.check("student_forward/velocity", output.sample)
    case.check("student_forward/projected", term.projector(output.features[sites[0]]))


def _dit(case: Case, **weights: Tensor) -> DiT:
    """The case's network with some official weights replaced; its head holds the factor that the official one has
    in front of it."""
    options = {k: v for k, v in case.kwargs.items() if not k.startswith("base_") and k != "output_mult"}
    state = {**case.state, **weights}
    factor = case.kwargs["output_mult"] * case.kwargs["base_hidden"] / case.kwargs["hidden_size"]
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"] * factor
    return DiT.from_official(state, options)


def _mup(case: Case) -> MuP:
    options = case.kwargs
    return MuP(base_width=options["base_hidden"], output_scale=options["output_mult"], zero_modulations=False)


@pytest.mark.parametrize("case", cases("mup", klass="DiT"), ids=str)
def test_mup_of_dit(case):
    """Forward pass, roles of all parameters, initial deviations, and one step of AdamW."""
    mup = _mup(case)
    model = _dit(case)
    ours = {official: DiT.dialect_of(case.state).name(official) for official in case.meta["table"]}
    t = (case.inputs["t"] + 1) / 1000
    output = model(case.inputs["x"], t, Condition(labels=case.inputs["y"]))
    sample = torch.cat((output.sample, output.extra["variance"]), 1)
    case.check("sample", sample)

    rate, decay = 2**-10, 0.1
    optimizer = AdamW(lr=rate, weight_decay=decay, decay_vectors=True).build(
        model.named_parameters(), mup.factors(model)
    )
    (sample - case.inputs["target"]).square().mean().backward()
    optimizer.step()
    changed = {k.removeprefix("after/"): v for k, v in case.outputs.items() if k.startswith("after/")}
    after = dict(_dit(case, **changed).named_parameters())
    for official in changed:
        name = ours[official]
        torch.testing.assert_close(
            dict(model.named_parameters())[name], after[name], rtol=0, atol=case.tolerance, msg=f"{case}: {official}"
        )


@pytest.mark.parametrize("case", cases("mup", klass="DiT"), ids=str)
def test_mup_table_of_dit(case):
    mup = _mup(case)
    torch.manual_seed(0)
    model = _dit(case)
    mup.initialised(model)
    rows, parameters = mup.table(model), dict(model.named_parameters())
    for official, told in case.meta["table"].items():
        if official == "pos_embed":  # computed, not learned
            continue
        name = DiT.dialect_of(case.state).name(official)
        row, p = rows[name], parameters[name]
        folded = row.factors.lr if row.kind == "output" else 1.0  # official: a factor in front of the layer
        assert row.factors.lr / folded == pytest.approx(told["lr_over_base"]), official
        assert 0.1 * row.factors.weight_decay * folded == pytest.approx(told["weight_decay"]), official
        assert row.ratio == pytest.approx(told["width_mult"]), official
        grows = {"hidden": 2, "input": 1, "output": 1, "vector": 1, "fixed": 0}[row.kind]
        assert grows == told["ninf"], official
        assert float(p.detach().std(correction=0)) == pytest.approx(told["init_std"], rel=6 / p.numel() ** 0.5), (
            official
        )
