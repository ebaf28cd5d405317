"""Terms and parametrization that make learning faster, against the official codes' numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.parity.cases import Case, cases
from tests.parity.closed_form import Recorded, alone, batch_of
from untwine.contracts import Condition, Output
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import Branch, Guided, classifier_free
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import integrate
from untwine.diffusion.solvers import Euler, Heun
from untwine.diffusion.timesteps import LogitNormalTime, TimeGrid, UniformTime
from untwine.models.ddt import DDT
from untwine.models.dit import DiT, ImprovedDiT
from untwine.models.sit import SiT
from untwine.testing import check_objective
from untwine.training.objectives.dispersive import Dispersive
from untwine.training.objectives.flow_matching import FlowMatching
from untwine.training.objectives.sra import DualTime, SelfAlignment, distance
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
    """A network of the case, and the weights of its projector by our names; roles are prefixes, where there are two."""
    prefix = f"{role}." if f"{role}.pos_embed" in case.state or f"{role}.x_embedder.proj.bias" in case.state else ""
    state = {k.removeprefix(prefix): v for k, v in case.state.items() if k.startswith(prefix)}
    if "pos_embed" not in state:
        state["pos_embed"] = case.state["student.pos_embed"]
    head = {k.removeprefix("ap_head.linear"): v for k, v in state.items() if k.startswith("ap_head.")}
    places = {"1": "0", "2": "2"}
    model = SiT.from_official(state, case.kwargs["net"], system="sra")
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


@pytest.mark.parametrize("case", cases("sra", klass="SRALoss", file="SiT-SRA_DTS_AS/{model,loss}"), ids=str)
def test_dual_time_of_sra(case, caplog):
    """Groups of tokens with times of their own; the teacher is the student's own weights."""
    options, given = case.kwargs, case.inputs
    assert (options["loss_type"], options["teacher_t"], options["teacher_mask"]) == ("cos", "sra", True)
    with caplog.at_level("INFO", logger="untwine.models.sit"):
        student, head = _network(case, "student")
    assert SiT.is_official(case.state, "sra")
    assert "ap_head.linear2.bias" in caplog.text
    ratio = options["mask_ratio"]
    fractions = (ratio, 1 - ratio) if isinstance(ratio, float) else tuple(r / sum(ratio) for r in ratio)
    names = {
        f"{ours}/{g}" if g else ours: f"{theirs}{g}"
        for g in range(len(fractions))
        for ours, theirs in (("t", "t"), ("sra", "k"))
    }
    drawn = {ours: given[theirs].flatten() for ours, theirs in names.items()}
    draws = Recorded(noise=given["noise"], groups=given["perm_noise"], **drawn)
    term = SelfAlignment(
        site=f"blocks.{options['block_out_s'] - 1}",
        teacher_site=f"blocks.{options['block_out_t'] - 1}",
        distance="cosine_over_tokens",
    )
    term.bind(student)
    term.projector.load_state_dict(head)
    objective = DualTime(fractions=fractions, label_dropout=0.0, terms=(term,))
    batch = batch_of(given["images"], given["labels"])
    networks: dict[str, nn.Module] = {"model": student, "teacher": student}
    loss = objective(networks, batch, update="model", step=0, draws=draws)
    case.check("denoising_per_sample", loss.per_sample)
    torch.testing.assert_close(loss.parts["sra"], case.outputs["align_cos"].mean(), rtol=0, atol=case.tolerance)

    draw, t = objective.mixed_draw(student, batch, draws)
    assert torch.equal(draw.groups, case.outputs["group_ids"])
    counts = torch.stack([(draw.groups == g).sum(1) for g in range(len(fractions))], 1)
    assert torch.equal(counts, case.outputs["group_counts"])
    mask, site = draw.attention_mask, term.sites[0]
    tokens = student(draw.x_t, t, draw.condition, attention_mask=mask, features=(site,)).features[site]
    case.check("align_cos", distance(term.projector(tokens), term._taught(draw, student), "cosine_over_tokens"))


@pytest.mark.parametrize("network", [SiT, DDT], ids=["sit", "ddt"])
def test_dual_time_of_any_size(network):
    """Groups that do not attend to each other, whole numbers of tokens, and plain flow matching in evaluation."""
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 4, "patch_size": 2}
    model = network(**sizes, **({"encoder_depth": 2} if network is DDT else {}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    batch = batch_of(torch.randn(4, 1, 8, 12), torch.arange(4))
    term = SelfAlignment(site="blocks.0", teacher_site="blocks.1")
    objective = DualTime(fractions=(0.3, 0.3, 0.4), terms=(term,))
    objective.bind(model)
    check_objective(lambda: objective, {"model": model, "teacher": model}, batch)
    draw, t = objective.mixed_draw(model, batch, Draws(0))
    assert [int((draw.groups == g).sum()) for g in range(3)] == [4 * 7, 4 * 7, 4 * 10]
    assert all(
        torch.equal(t[draw.groups == g], time.repeat_interleave(n))
        for g, (time, n) in enumerate(zip(draw.times, (7, 7, 10)))
    )
    objective.eval()
    flow = FlowMatching(time=UniformTime(), terms=(term,)).eval()
    pair = [
        o({"model": model, "teacher": model}, batch, update="model", step=0, draws=Draws(0)) for o in (objective, flow)
    ]
    assert torch.equal(pair[0].total, pair[1].total)
    with pytest.raises(ValueError, match="sum to 1"):
        DualTime(fractions=(0.5, 0.6))
    with pytest.raises(ValueError, match="velocity predictor"):
        DualTime()({"model": DiT(**sizes, learn_sigma=False)}, batch, update="model", step=0, draws=Draws(0))


class SRAStub(nn.Module):
    """The closed-form network of the case; the null label adds nothing."""

    predicts, decoupled, accepts = "velocity", False, frozenset({"labels"})

    def forward(self, x, t, condition, features=()):
        t, label = (v.view(-1, 1, 1, 1) for v in (t, condition.labels))
        return Output(0.6 * torch.tanh(x) * torch.cos(2 * t) - 0.2 * x + (0.02 * label) % 1)


@pytest.mark.parametrize("case", cases("sra", klass="euler_sampler", file="samplers.py"), ids=str)
def test_samplers_of_sra(case):
    """Both stages of a Heun step are guided by the time at which the step starts, on the official float64 grid."""
    labels = case.inputs["y"]
    branches = {
        "cond": Branch(SRAStub(), Condition(labels=labels)),
        "null": Branch(SRAStub(), Condition(labels=torch.full_like(labels, 1000))),
    }
    for name, setting in case.kwargs.items():
        is_sde, num_steps = setting["kind"] == "sde", setting["num_steps"]
        low, high = setting.get("guidance_low", 0.0), setting.get("guidance_high", 1.0)
        grid = TimeGrid(num_steps, last_step=0.04 if is_sde else None).times()
        official = torch.linspace(1, 0.04 if is_sde else 0.0, num_steps + (not is_sde), dtype=torch.float64)
        table = classifier_free(setting["cfg_scale"])

        def weights(at, t, official=official, low=low, high=high, table=table):
            return table(at, t) if low <= float(official[at.step]) <= high else alone(at, t)

        guided = Guided(branches, weights, path=LinearPath())

        def denoise(x, t, at, guided=guided):
            return replace(guided(x.float(), t, at), x=x)

        out = integrate(
            Heun() if setting.get("heun") else Euler("sde", "time", "mean") if is_sde else Euler(),
            denoise,
            case.inputs["latents"].double(),
            grid,
            path=LinearPath(),
            noise=lambda at: case.inputs["step_noise"][at.step],
        )
        case.check(name, out)


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
