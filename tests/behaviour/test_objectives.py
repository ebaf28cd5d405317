"""Objectives: the contract, the draws, the weights, and that a model learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.objectives import ProjectorTerm, TwoNetworks
from tests.tiny import tiny
from untwine.contracts import Batch, Condition, Output, cat, check_labels
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import CosinePath, DiscretePath, LinearPath
from untwine.diffusion.timesteps import UniformTime
from untwine.models.ddt import DDT
from untwine.models.ddt_head import DDTHead
from untwine.models.dit import DiT, ImprovedDiT
from untwine.testing import check_objective
from untwine.training.metering import read_log
from untwine.training.objectives.alignment import Alignment
from untwine.training.objectives.base import Role
from untwine.training.objectives.flow_matching import FlowMatching, time_weight
from untwine.training.objectives.joint import BasePrediction, ClassToken
from untwine.training.objectives.learned_variance import VariationalBound, bound, discretized_log_likelihood
from untwine.training.trainer import Trainer


def _model(kind=DDT, **options):
    torch.manual_seed(0)
    split = {"encoder_depth": 2} if kind is DDT else {}
    model = kind(in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=4, **split, **options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def _batch(size=6):
    x0 = Draws(0).normal("x", (1, 8, 8), range(size))
    return Batch(x0, Condition(labels=torch.arange(size) % 4), torch.arange(100, 100 + size))


def _head(**options):
    """A small in-context DDT head."""
    torch.manual_seed(0)
    model = DDTHead(
        in_channels=1, hidden_size=32, decoder_hidden_size=40, depth=3, encoder_depth=2, num_heads=2,
        decoder_num_heads=2, patch_size=2, num_classes=4, conditioning="tokens", num_time_tokens=2, num_label_tokens=2,
        **options,
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


OBJECTIVES = {
    "plain": lambda: FlowMatching(),
    "x0 in velocities": lambda: FlowMatching(path=LinearPath(sigma_floor=0.05), loss_in="velocity"),
    "weighted, another path": lambda: FlowMatching(path=CosinePath(), weighting="snr_cap"),
    "a term with parameters": lambda: FlowMatching(terms=(ProjectorTerm(),)),
}


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", [DDT, ImprovedDiT])
def test_contract(make, kind):
    torch.manual_seed(0)
    objective = make()
    check_objective(lambda: objective, {"model": _model(kind)}, _batch())


def test_contract_of_two_networks():
    objective = TwoNetworks()
    networks = {"model": _model(), "critic": objective.networks()["critic"].init()}
    check_objective(lambda: objective, networks, _batch())


def test_roles_are_checked():
    with pytest.raises(ValueError, match="source must be 'ema:k'"):
        Role(trainable=True, source="ema:0")


def test_labels_are_dropped_as_often_as_asked():
    objective, model = FlowMatching(label_dropout=0.25), _model()
    labels = torch.ones(4000, dtype=torch.long)
    batch = Batch(torch.zeros(4000, 1, 8, 8), Condition(labels=labels), torch.arange(4000))
    dropped = objective.condition(model, batch, Draws(0)).labels == model.config.num_classes
    assert 0.22 < dropped.float().mean() < 0.28
    part = batch.select(slice(1000, 1010))
    assert torch.equal(objective.condition(model, part, Draws(0)).labels == 4, dropped[1000:1010])
    objective.eval()
    assert torch.equal(objective.condition(model, batch, Draws(0)).labels, labels)


def test_evaluation_draws_uniform_times():
    objective, batch = FlowMatching(), Batch(torch.zeros(2000, 1, 2, 2), Condition(), torch.arange(2000))
    spread = {}
    for training in (True, False):
        objective.train(training)
        t = objective.draw(_model(), batch, Draws(0)).t
        spread[training] = float(((t < 0.1) | (t > 0.9)).float().mean())
    assert spread[True] < 0.05
    assert 0.17 < spread[False] < 0.23


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("inverse_variance", 4.0), ("snr", 1.0), ("snr_floor", 5.0), ("snr_cap", 1.0)],
)
def test_weights_at_the_middle(weighting, expected):
    t = torch.tensor([0.5, 1.0, 0.0])
    weight = time_weight(weighting, LinearPath(), t)
    assert weight[0] == pytest.approx(expected)
    assert weight.isfinite().all()
    assert time_weight("constant", LinearPath(), t) is None


def test_labels_are_checked_on_the_host():
    assert check_labels([0, 3], 4).tolist() == [0, 3]
    for labels in ([0, 4], [-1], [0.5], [[1]], [True]):
        with pytest.raises(ValueError, match="labels must be"):
            check_labels(labels, 4)


def test_values_join_select_and_move():
    batch = _batch()
    again = cat([batch.select(slice(0, 2)), batch.select(slice(2, None))])
    assert torch.equal(again.x0, batch.x0)
    assert torch.equal(again.condition.labels, batch.condition.labels)
    moved = batch.to(torch.bfloat16)
    assert (moved.x0.dtype, moved.index.dtype) == (torch.bfloat16, torch.int64)
    condition = Condition(labels=torch.arange(2), vectors={"text": torch.zeros(2, 1, 3)})
    assert condition.keys() == {"labels", "vectors.text"}
    assert condition.drop("vectors.text").keys() == {"labels"}
    with pytest.raises(ValueError, match="has no"):
        condition.drop("dense.mask")


def test_condition_can_be_exported():
    """A Condition is a pytree of tensors to torch.export and torch.compile."""
    leaves, spec = torch.utils._pytree.tree_flatten(Condition(labels=torch.arange(2)))
    assert [leaf.tolist() for leaf in leaves if leaf is not None] == [[0, 1]]
    assert torch.utils._pytree.tree_unflatten(leaves, spec).labels.tolist() == [0, 1]


def test_a_model_learns(tmp_path):
    """A hundred steps on real digits leave the loss of predicting the mean far behind."""
    recipe = tiny(**{"train.num_steps": 100, "train.batch_size": 64, "train.validate_every": 50, "optimizer.lr": 3e-3})
    trainer = Trainer(recipe, tmp_path)
    result = trainer.fit()
    pixels = torch.stack([trainer.training_set.read(k) for k in range(500)])
    constant = 1 + float(pixels.var(dim=0, unbiased=False).mean())
    first, last = (line["loss"] for line in read_log(tmp_path / "log.jsonl", "validation"))
    assert result.metrics["validation_loss"] == last < first < constant
    assert last < 0.8 * constant
    bins = read_log(tmp_path / "log.jsonl", "validation")[-1]["loss_per_time_bin"]
    assert len(bins) == 10
    assert all(value > 0 for value in bins)


def test_validation_repeats_exactly(tmp_path):
    """The same weights on the same triples give the same number, whatever the batch size."""
    losses = []
    for size in (16, 64):
        recipe = tiny(**{"train.num_steps": 1, "train.batch_size": size, "optimizer.lr": 0.0})
        losses.append(Trainer(recipe, tmp_path / str(size)).fit().metrics["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_any_backbone_may_predict_noise_or_data():
    """What the output means is in the config, travels with it, and the same x0 network is seen through the path."""
    model, draws = _model(predicts="x0"), Draws(0)
    again = DDT.from_config(dict(model.config))
    assert (model.predicts, again.predicts, _model().predicts) == ("x0", "x0", "velocity")
    objective = FlowMatching(path=LinearPath(sigma_floor=0.2), loss_in="velocity", label_dropout=0.0)
    batch = _batch(64)
    loss = objective({"model": model}, batch, update="model", step=0, draws=draws)
    draw = objective.draw(model, batch, draws)
    out = model(draw.x_t, draw.t, batch.condition).sample
    t = draw.t.clamp(min=0.2).view(-1, 1, 1, 1)
    expected = ((draw.x_t - out) / t - (draw.x_t - batch.x0) / t).square().flatten(1).mean(1)
    assert (draw.t < 0.2).any()
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="predicts must be one of"):
        _model(predicts="epsilon")


def test_noise_predictor_learns_its_variance_on_a_discrete_chain():
    """Times are levels; the bound moves the variance alone, and vanishes at the variance of the posterior."""
    torch.manual_seed(0)
    model = DiT(in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    path = DiscretePath()
    objective = FlowMatching(path=path, time=UniformTime(), terms=(VariationalBound(),))
    check_objective(lambda: objective, {"model": model}, _batch())
    draw = objective.draw(model, _batch(), Draws(0))
    assert torch.allclose(draw.t * 1000, (path.levels(draw.t) + 1).float())
    noise = torch.zeros_like(draw.x0, requires_grad=True)
    variance = torch.zeros_like(draw.x0, requires_grad=True)
    VariationalBound()(draw, Output(noise, extra={"variance": variance}), {})["bound"].sum().backward()
    assert noise.grad is None
    assert variance.grad.abs().max() > 0
    exact = bound(path, draw.x0, draw.x0, draw.x_t, draw.t, -torch.ones_like(draw.x0))
    assert exact.abs().max() < 1e-6
    with pytest.raises(ValueError, match="needs path: discrete"):
        FlowMatching(terms=(VariationalBound(),))({"model": model}, _batch(), update="model", step=0, draws=Draws(0))


def test_likelihood_of_the_bins_sums_to_one():
    """Over all 256 values of a pixel, for any mean and deviation."""
    x = torch.linspace(-1, 1, 256).double()
    for mean, log_std in ((0.0, -1.0), (0.93, -3.0), (-1.0, -5.0)):
        found = discretized_log_likelihood(x, torch.tensor(mean).double(), torch.tensor(log_std).double())
        assert float(found.exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("metric", ["cosine", "mse"])
def test_alignment_reaches_the_blocks_below_its_site(metric):
    """Gradients of the alignment alone stop at the site; without a scale, training is the plain run's bitwise."""
    batch = replace(_batch(), features={"dino": torch.randn(6, 16, 5), "mae": torch.randn(6, 4, 3)})

    def gradients(scale):
        torch.manual_seed(1)
        options = {"width": 32, "targets": {"dino": 5, "mae": 3}, "projector_width": 16}
        term = Alignment(site="blocks.0", metric=metric, scale=scale, **options)
        objective, model = FlowMatching(label_dropout=0.0, terms=(term,) if scale is not None else ()), _model()
        objective.terms[0].scale = 0.0 if scale == 1.0 else 1.0
        objective({"model": model}, batch, update="model", step=0, draws=Draws(0)).total.backward()
        return {n: p.grad for n, p in model.named_parameters()}, term

    alone, term = gradients(1.0)
    reached = {n.split(".")[1] for n, g in alone.items() if g.abs().max() > 0 and n.startswith("blocks.")}
    assert reached == {"0"}
    assert all(p.grad.abs().max() > 0 for p in term.projectors.parameters() if p.ndim > 1)
    plain, off = gradients(None)[0], gradients(0.0)[0]
    assert all(torch.equal(plain[name], off[name]) for name in plain)


def test_alignment_checks_its_features():
    term = Alignment(width=32, targets={"dino": 5}, site="blocks.1", projector="linear")
    objective, model = FlowMatching(terms=(term,)), _model()

    def run(**features):
        batch = replace(_batch(), features=features)
        return objective({"model": model}, batch, update="model", step=0, draws=Draws(0))

    with pytest.raises(ValueError, match=r"lacks \['dino'\]"):
        run(mae=torch.zeros(6, 16, 5))
    with pytest.raises(ValueError, match="neither the 4 x 4 of the backbone nor a square"):
        run(dino=torch.zeros(6, 17, 5))
    assert run(dino=torch.ones(6, 49, 5)).parts["alignment"].abs() <= 1
    objective.eval()
    assert "alignment" not in run().parts
    with pytest.raises(ValueError, match="targets must name features"):
        Alignment(width=32, targets={})


def test_class_token_is_diffused_with_the_image():
    """The token of the batch is packed with the image, weighted apart, and aligned as the first token."""
    model = _head(class_token_dim=5, base_depth=1)
    token = torch.randn(6, 5)
    terms = (
        ClassToken(),
        BasePrediction(),
        Alignment(width=32, targets={"dino": 5}, site="blocks.1", projector="linear", class_token=True),
    )
    objective = FlowMatching(label_dropout=0.0, terms=terms)
    batch = replace(_batch(), features={"class_token": token, "dino": torch.randn(6, 16, 5)})
    check_objective(lambda: objective, {"model": model}, batch)
    loss = objective({"model": model}, batch, update="model", step=0, draws=Draws(0))
    weights = {"flow": 1.0, "class_token": 0.03, "base": 1.0, "alignment": 0.5}
    assert loss.parts.keys() == weights.keys()
    assert loss.total.item() == pytest.approx(sum(weights[k] * float(v) for k, v in loss.parts.items()), rel=1e-5)
    draw = objective.draw(model, batch, Draws(0))
    assert torch.equal(model.unpack(draw.x0)["token"], token)
    packed = replace(batch, x0=draw.x0)
    assert torch.equal(objective.draw(model, packed, Draws(0)).x_t, draw.x_t)
    with pytest.raises(ValueError, match="lacks 'class_token'"):
        objective.draw(model, _batch(), Draws(0))


@pytest.mark.parametrize("term", [ClassToken(), BasePrediction()])
def test_terms_name_the_model_that_they_need(term):
    with pytest.raises(ValueError, match="needs a model"):
        FlowMatching(terms=(term,))({"model": _model()}, _batch(), update="model", step=0, draws=Draws(0))


def test_terms_are_options_of_a_recipe():
    recipe = tiny(
        **{
            "model.predicts": "x0",
            "objective.path": {"kind": "linear", "sigma_floor": 0.05},
            "objective.loss_in": "velocity",
            "objective.terms": [{"kind": "alignment", "width": 32, "targets": {"dino": 12}, "site": "blocks.1"}],
        }
    )
    objective = type(recipe).from_dict(recipe.to_dict()).objective.build()
    assert objective.path == LinearPath(sigma_floor=0.05)
    assert objective.terms[1].targets == ("dino",)
