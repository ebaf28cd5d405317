"""Objectives: the contract, the draws, the weights, and that a model learns."""

from __future__ import annotations

import pytest
import torch

from tests.objectives import ProjectorTerm, TwoNetworks
from tests.tiny import tiny
from untwine.contracts import Batch, Condition, cat, check_labels
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import CosinePath, LinearPath
from untwine.models.ddt import DDT
from untwine.models.dit import ImprovedDiT
from untwine.testing import check_objective
from untwine.training.metering import read_log
from untwine.training.objectives.base import Role
from untwine.training.objectives.flow_matching import FlowMatching, time_weight
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


OBJECTIVES = {
    "plain": lambda: FlowMatching(),
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
