"""MeanFlow: the identity it trains, its coin, its guided target, its solver, and how it is sampled."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny
from untwine.contracts import Batch, Condition, Output
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import ending
from untwine.diffusion.sampling import Sampling, sample
from untwine.diffusion.solvers import Euler, MeanFlow
from untwine.models.ddt_head import DDTHead
from untwine.models.lightningdit import LightningDiT
from untwine.testing import check_objective
from untwine.training.metering import read_log
from untwine.training.objectives.flow_matching import FlowMatching
from untwine.training.objectives.mean_flow import MeanFlow as MeanFlowObjective
from untwine.training.trainer import Trainer

TWO_TIMES = {"conditioning": "tokens", "second_time": True, "num_time_tokens": 2, "num_label_tokens": 2}


def _model(kind=LightningDiT, **options):
    torch.manual_seed(0)
    split = {"encoder_depth": 1, "decoder_hidden_size": 32, "decoder_num_heads": 2} if kind is DDTHead else {}
    shape = {"in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2}
    model = kind(**shape, **{"num_classes": 4} | TWO_TIMES | split | options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def _batch(size=6):
    x0 = Draws(0).normal("x", (1, 8, 8), range(size))
    return Batch(x0, Condition(labels=torch.arange(size) % 4), torch.arange(100, 100 + size))


class Straight(torch.nn.Module):
    """Data at one point: the velocity is the same all along a line, and so is its mean over any part."""

    predicts, accepts, decoupled = "velocity", frozenset({"vectors.r"}), False

    def __init__(self, point: float) -> None:
        super().__init__()
        self.point, self.asked = point, []

    def forward(self, x, t, condition, features=()):
        self.asked.append((float(t[0]), float(condition.vectors["r"][0])))
        return Output((x - self.point) / t.view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", [LightningDiT, DDTHead])
@pytest.mark.parametrize("flow_ratio", [0.0, 1.0])
def test_contract(kind, flow_ratio):
    torch.manual_seed(0)
    objective = MeanFlowObjective(flow_ratio=flow_ratio, omega=1.5, kappa=0.2)
    check_objective(lambda: objective, {"model": _model(kind)}, _batch())


def test_the_mean_velocity_of_straight_lines_has_no_loss():
    """u = v satisfies the identity where trajectories are straight; a network that is off by one does not."""
    objective = MeanFlowObjective(flow_ratio=0.0, label_dropout=0.0)
    batch = Batch(torch.full((8, 1, 2, 2), 0.3), Condition(), torch.arange(8))
    for point, is_right in ((0.3, True), (0.4, False)):
        loss = objective({"model": Straight(point)}, batch, update="model", step=0, draws=Draws(0))
        assert (float(loss.per_sample.max()) < 1e-6) == is_right


def test_the_derivative_is_that_of_finite_differences():
    """du/dt along (v, 1, 0) through a network, in float64."""
    model, objective, batch = _model().double(), MeanFlowObjective(flow_ratio=0.0, label_dropout=0.0), _batch()
    t, r = torch.full((6,), 0.7).double(), torch.full((6,), 0.2).double()
    draw = objective.draw(model, batch, Draws(0), t=t)
    x, v = draw.x_t.double(), draw.target.double()

    def u(h):
        return model(x + h * v, t + h, ending(batch.condition, r)).sample

    with torch.no_grad():
        slope = (u(1e-2) - u(-1e-2)) / 2e-2
        found = objective._along(model, batch.condition, draw, r).sample
    torch.testing.assert_close(found.double(), u(0) + 0.5 * slope, rtol=0, atol=2e-3 * float(slope.abs().max()))


def test_most_steps_are_plain_flow():
    """One coin a step; with heads the loss is the plain flow's, and the first time is the end's."""
    objective, model, batch = MeanFlowObjective(label_dropout=0.0), Straight(0.0), _batch()
    plain = 0
    for step in range(400):
        model.asked.clear()
        objective({"model": model}, batch, update="model", step=step, draws=Draws(0))
        t, r = model.asked[0]
        assert r <= t
        plain += r == t
    assert 0.68 < plain / 400 < 0.82


def test_evaluation_measures_the_velocity():
    """As plain flow matching does, of the same network at r = t."""

    class Instantaneous(torch.nn.Module):
        predicts, accepts = "velocity", frozenset({"labels"})

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, t, condition, features=()):
            return self.model(x, t, ending(condition, t), features=features)

    model = _model()
    found = [
        objective.eval()({"model": network}, _batch(), update="model", step=0, draws=Draws(0))
        for objective, network in ((MeanFlowObjective(omega=2.0), model), (FlowMatching(), Instantaneous(model)))
    ]
    assert found[0].parts.keys() == found[1].parts.keys() == {"flow"}
    torch.testing.assert_close(found[0].per_sample, found[1].per_sample)


def test_guided_target_is_where_it_should_be():
    """Inside the interval and for kept labels only; omega = 1, kappa = 0 leaves it alone."""
    model, batch, draws = _model(), _batch(64), Draws(0)
    objective = MeanFlowObjective(omega=2.0, kappa=0.5, guidance_interval=(0.3, 0.6), label_dropout=0.4)
    draw = objective.draw(model, batch, draws)
    changed = (objective.guided(model, batch, draw, draws) != draw.target).flatten(1).any(1)
    kept = objective.kept(batch, draws)
    assert torch.equal(changed, kept & (draw.t >= 0.3) & (draw.t <= 0.6))
    assert 0 < changed.sum() < 64
    plain = MeanFlowObjective(label_dropout=0.4)
    assert torch.equal(plain.guided(model, batch, draw, draws), draw.target)


def test_the_solver_asks_for_the_mean_over_its_steps():
    """One step is exact for straight lines; a solver of the flow asks the same network for velocities at r = t."""
    model = Straight(0.25)
    for solver, ends in ((MeanFlow(), [0.5, 0.0]), (Euler(), [1.0, 0.5])):
        model.asked.clear()
        settings = Sampling(solver=solver, num_inference_steps=2)
        out, _ = sample(model, Condition(), (1, 2, 2), torch.arange(3), draws=Draws(0), sampling=settings)
        assert torch.allclose(out, torch.full_like(out, 0.25), atol=1e-6)
        assert model.asked == list(zip([1.0, 0.5], ends))


@pytest.mark.parametrize("kind", [LightningDiT, DDTHead])
def test_sampling_of_models_of_two_times(kind):
    """With labels and guidance, the end of the step given by the sampler."""
    settings = Sampling(solver=MeanFlow(), num_inference_steps=2, guidance_scale=2.0)
    condition = Condition(labels=torch.tensor([0, 3]))
    out, guided = sample(_model(kind), condition, (1, 8, 8), torch.arange(2), draws=Draws(0), sampling=settings)
    assert out.isfinite().all()
    assert guided.num_evaluations == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_time": False}, "two times"),
        ({"predicts": "x0"}, "two times"),
        ({"kind": DDTHead, "class_token_dim": 3}, "cannot train a class token"),
    ],
)
def test_other_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MeanFlowObjective()({"model": _model(**options)}, _batch(), update="model", step=0, draws=Draws(0))


def test_bad_options_are_named():
    for options, message in (({"flow_ratio": 1.5}, "flow_ratio"), ({"label_dropout": 1.0}, "label_dropout")):
        with pytest.raises(ValueError, match=message):
            MeanFlowObjective(**options)


def test_it_trains_from_a_recipe(tmp_path):
    """And previews, validates and resumes like any other objective."""
    shape = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    recipe = tiny(
        **{
            "model": {"kind": "lightningdit", **shape, **TWO_TIMES},
            "objective": {"kind": "mean_flow", "flow_ratio": 0.5},
            "sampling": {"solver": "mean_flow", "num_inference_steps": 1},
            "train.num_steps": 6,
            "train.validate_every": 3,
            "train.sample_every": 6,
        }
    )
    Trainer(recipe, tmp_path).fit()
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl", "validation")]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    assert (tmp_path / "samples" / "step-6.png").is_file()
